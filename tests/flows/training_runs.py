"""What the tests of training runs share: a run of a fleet, and a trainer that kills its process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.numpy_trainer import NumpyTrainer
from examples.rewards import letters
from hotload.clients.store import Store
from hotload.clients.store.step_records import read_steps
from hotload.rollout.trajectory import Problem, Trajectory
from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec
from hotload.training.step_record import StepRecord
from tests.flows.fleet import Fleet
from tests.flows.killed_cycle import FlowProcess

Kill = tuple[str, dict[str, str]]
"""A line that is awaited before a run is killed, or the environment in which it dies by itself."""
DIES = "HOTLOAD_TEST_TRAINER_DIES"
"""A call and how often it is let pass: `export 1`. `export! 1` dies when it has been made."""


def declared(fleet: Fleet, *, root: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A training run as its file has it: four problems, two a step, one step a window.

    Args:
        root: where this machine keeps its files.
        changes: of `cycle` and of fields of `training`.
    """
    here = fleet.root if root is None else root
    cycle = fleet.declared(0, run_id="learn", work_dir=str(here / "work"))
    for set_by_the_loop in ("checkpoint", "policy_version"):
        del cycle[set_by_the_loop]
    cycle["sampling"] = {"completions_per_prompt": 4, "max_completion_tokens": 4, "seed": 5}
    training = {
        "trainer": {
            "name": "tests.flows.training_runs:open_mortal_trainer",
            "arguments": {
                "base_model": str(fleet.checkpoints[0]),
                "states": str(here / "states"),
            },
        },
        "windows": {"prompt_groups_per_step": 2, "seed": 3},
        "loss": {"kl_beta": 0},
        "schedule": {"learning_rate": 1e-3},
    }
    return {"cycle": cycle | changes.pop("cycle", {}), "training": training | changes}


def spec_of(fleet: Fleet, **changes: Any) -> TrainingSpec:
    """The same, checked."""
    document = declared(fleet, **changes)
    return TrainingSpec.model_validate({**document["training"], "cycle": document["cycle"]})


def ahead_of(fleet: Fleet, **changes: Any) -> AsyncTrainingSpec:
    """The same as an asynchronous run, checked."""
    document = declared(fleet, **changes)
    return AsyncTrainingSpec.model_validate({**document["training"], "cycle": document["cycle"]})


def with_problems(fleet: Fleet, count: int) -> None:
    """Let the run have so many problems."""
    rows = ({"id": f"sum-{n}", "prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(count))
    (fleet.root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def always_right(problem: Problem, trajectory: Trajectory) -> float:
    """A reward that is always equal, so that nothing can be learnt."""
    return 1.0


def right_once_trained(problem: Problem, trajectory: Trajectory, records: str) -> float:
    """A reward that something can be learnt from, until a step is recorded."""
    return 1.0 if list(Path(records).glob("*.json")) else letters(problem, trajectory)


async def read_run(fleet: Fleet) -> list[StepRecord]:
    """The records of the run, in order."""
    return await read_steps(Store(fleet.bucket.as_uri()), "learn")


def bits(records: list[StepRecord]) -> list[tuple[Any, ...]]:
    """What must be the same however often a run was killed: nothing that a clock says."""
    return [
        (
            one.state and one.state.sha256,
            one.checkpoint,
            problems_of(one),
            one.window_began,
            one.cursor,
            one.learning_rate,
        )
        for one in records
    ]


def run_killed(
    module: str, fleet: Fleet, document: dict[str, Any], kills: Sequence[Kill]
) -> tuple[int, list[str]]:
    """Start a run once for every kill, and once more to its end; returns how many kills came in
    time, and every line that was logged."""
    count, log = 0, list[str]()
    for said, environment in kills:
        process = FlowProcess(module, fleet.root / "run.yaml", document, **environment)
        if process.reaches(lambda one, said=said: bool(said) and one.has_said(said)):  # type: ignore[misc]
            process.kill()
        assert process.exit_code in (0, -9), "\n".join(process.log[-40:])
        count += process.exit_code == -9
        log += process.log
        print(f"  {said or environment[DIES]}: exit {process.exit_code} {process.last_step()}")
    last = FlowProcess(module, fleet.root / "run.yaml", document)
    last.finish()
    return count, log + last.log


def problems_of(record: StepRecord) -> list[str]:
    """The problems of a step, in order."""
    return [problem for part in record.groups for problem in part.problem_ids]


def open_mortal_trainer(base_model: str, states: str) -> NumpyTrainer:
    """The numpy trainer, which kills its process where the environment says so."""
    trainer = NumpyTrainer(Path(base_model), Path(states))
    call, _, passed = os.environ.get(DIES, "").partition(" ")
    if call:
        _let_die(trainer, call, int(passed))
    return trainer


def open_raising_trainer(base_model: str, states: str) -> NumpyTrainer:
    """The numpy trainer, which fails in its first step and tells a key."""
    trainer = NumpyTrainer(Path(base_model), Path(states))

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"out of memory, {os.environ['HOTLOAD_TEST_API_KEY']}")

    trainer.step = raising  # type: ignore[method-assign]
    return trainer


def open_diverging_trainer(base_model: str, states: str) -> NumpyTrainer:
    """The numpy trainer, whose weights are no numbers once it has made a step."""
    trainer = NumpyTrainer(Path(base_model), Path(states))
    real = trainer.step

    def diverging(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        trainer.model.weights["model.norm.weight"][:2] = float("nan"), float("inf")
        return made

    trainer.step = diverging  # type: ignore[method-assign]
    return trainer


def _let_die(trainer: NumpyTrainer, call: str, passed: int) -> None:
    method = getattr(trainer, call.rstrip("!"))
    left = passed

    def mortal(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and not call.endswith("!"):
            os.kill(os.getpid(), signal.SIGKILL)
        made = method(*args, **kwargs)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(trainer, call.rstrip("!"), mortal)
