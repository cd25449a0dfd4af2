"""What is looked at before a training run samples anything."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from examples.numpy_trainer import NumpyTrainer
from hotload.clients.store import Store
from hotload.errors import TrainerError
from hotload.trainers.declaration import TrainingSpec
from tasks.training.run import TrainingRun, WindowedRun, open_run

BASE = Path(__file__).parents[1] / "emulator" / "fixtures" / "llama"


class Replaying(NumpyTrainer):
    """Says that it replays routes."""

    replays_routes = True


def open_replaying() -> NumpyTrainer:
    return Replaying(BASE, Path("states"))


async def opened(root: Path, **sampling: Any) -> TrainingRun:
    dataset = root / "problems.jsonl"
    dataset.write_text(json.dumps({"prompt": "1 + 1 = ", "answer": "2"}))
    cycle = {
        "run_id": "run",
        "work_dir": str(root),
        "problems": {"dataset": str(dataset)},
        "sampling": sampling,
    }
    trainer = {"name": "tests.tasks.test_open_run:open_replaying"}
    spec = TrainingSpec.model_validate({"cycle": cycle, "trainer": trainer})
    with ThreadPoolExecutor(1) as calls:
        return await open_run.fn(spec, Store(root.as_uri()), calls, WindowedRun)


async def test_a_trainer_that_replays_routes_needs_some(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="set sampling"):
        await opened(tmp_path)
    run = await opened(tmp_path, include_routing_matrix=True)
    assert isinstance(run.trainer, NumpyTrainer)
