"""The rollout flow under a real Prefect server: handed back, found again, stopped when refused."""

import json
from pathlib import Path

import polars as pl
import pytest

from blocks.checkpoint_store import CheckpointStore
from flows.rollouts import roll_out_and_score
from hotload.dataset.table import check_rollouts
from hotload.errors import ServiceRefusedError
from hotload.spec import CycleSpec
from tests.blocks.scripted_inference import GOOD, IDENTITY, Script, block, http

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("prefect_api"),
    # Prefect leaves its own connections to its API to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def spec_in(directory: Path, *, is_warm: bool = False) -> CycleSpec:
    dataset = directory / "problems.jsonl"
    rows = ({"id": i, "prompt": f"problem {i}", "answer": "ab"} for i in range(5))
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CycleSpec.model_validate(
        {
            "checkpoint": str(directory),
            "work_dir": str(directory),
            "run_id": "run",
            "policy_version": 3,
            "rollouts": "scripted",
            "store": "scripted",
            "problems": {"dataset": str(dataset)},
            "sampling": {"completions_per_prompt": 2, "problems_per_task": 2},
            "readiness": {"warmup_after_hotload": not is_warm},
        }
    )


async def save_blocks(directory: Path, port: int) -> None:
    (directory / "store").mkdir(exist_ok=True)
    await block(port).save("scripted", overwrite=True)
    await CheckpointStore(url=f"file://{directory}/store").save("scripted", overwrite=True)


async def test_rolled_out_once_and_then_found(tmp_path: Path) -> None:
    async with Script(http(b"{}", content_type="application/json"), http(GOOD)).running() as script:
        await save_blocks(tmp_path, script.port)
        summary = await roll_out_and_score(spec_in(tmp_path), IDENTITY, 3)
        assert len(script.requests) == 1 + 10  # the warm-up goes first
        assert await roll_out_and_score(spec_in(tmp_path), IDENTITY, 3) == summary
        assert len(script.requests) == 1 + 10
    assert (summary.group_count, summary.sample_count, summary.mean_reward) == (5, 10, 1.0)
    directory = summary.parts_uri.removeprefix("file://")
    frame = check_rollouts(pl.read_parquet(f"{directory}/*.parquet"))
    assert frame.height == 10


async def test_a_refused_key_stops_the_flow(tmp_path: Path) -> None:
    async with Script(http(b"", 401)).running() as script:
        await save_blocks(tmp_path, script.port)
        with pytest.raises(ServiceRefusedError):
            await roll_out_and_score(spec_in(tmp_path, is_warm=True), IDENTITY)
    assert not (tmp_path / "store" / "_hotload").exists()
