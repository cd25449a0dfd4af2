"""The stage of the training examples: a fleet of three replicas, a Prefect server, and the loop.

Everything lies in `.demo/<name>/`, made anew by every run; only loopback is used.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.processes import emulator, prefect_server

DEMO = Path(__file__).resolve().parents[2] / ".demo"
NAMES = {"account_id": "demo", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--account", "demo", "--model", "tiny", "--deployment", "fleet"]


@dataclass(frozen=True)
class Lesson:
    """One example: its problems, and the fields of a run file that are its own."""

    name: str
    problems: Sequence[Mapping[str, Any]]
    epochs: int
    learning_rate: float
    groups_per_step: int
    group_size: int
    max_tokens: int
    reward: str
    rollout: str | None = None
    words: Mapping[str, float] = field(default_factory=dict)
    """Letters that the policy says more often at first, with so many nats."""

    @property
    def root(self) -> Path:
        """Where everything lies."""
        return DEMO / self.name


def main(lesson: Lesson) -> None:
    """Train from the command line; 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.rl_loop.{lesson.name}",
        description=f"Train the {lesson.name} example from random weights, through real cycles.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (%(default)s)")
    parser.add_argument(
        "--steps-per-version", type=int, default=1, metavar="N", help="a window (%(default)s)"
    )
    arguments = parser.parse_args()
    # SIGTERM and a closed terminal end it as Ctrl-C does: through every `finally`.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        run(lesson, arguments.seed, arguments.steps_per_version)
    except KeyboardInterrupt:
        say("stopped; every process of the example has ended")
        sys.exit(130)


def run(lesson: Lesson, seed: int, steps_per_version: int) -> None:
    """Train from nothing, a line per step on the terminal."""
    # Read as numpy is imported: trainer and replicas share the cores, and matrices are small.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from examples.rl_loop.tiny_policy import save_random_policy

    began = time.monotonic()
    root = lesson.root
    shutil.rmtree(root, ignore_errors=True)
    bucket, policy = root / "bucket", root / "policy"
    bucket.mkdir(parents=True)
    (root / "problems.jsonl").write_text(
        "".join(json.dumps(problem) + "\n" for problem in lesson.problems)
    )
    save_random_policy(policy, seed, lesson.words)
    with (
        prefect_server(root / "prefect") as api,
        emulator(bucket.as_uri(), policy, root / "emulator.log", FLEET) as url,
    ):
        say(f"Prefect at {api}, three replicas at {url}")
        asyncio.run(train(lesson, declared(lesson, seed, steps_per_version), url))
    say(f"{time.monotonic() - began:.0f} s with both servers' start")


async def train(lesson: Lesson, document: dict[str, Any], url: str) -> None:
    """Run the loop, and say where its time went."""
    from examples.five_cycles import declare_blocks
    from flows.rl_loop import rl_loop
    from hotload.clients.store import Store
    from hotload.clients.store.run_records import read_history
    from hotload.clients.store.step_records import read_steps, training_page_path
    from hotload.quantities import duration, percent
    from hotload.report.training_page import TimeShares
    from hotload.trainers.declaration import TrainingSpec

    bucket = (lesson.root / "bucket").as_uri()
    await declare_blocks(url, bucket, NAMES)
    logging.getLogger("prefect.task_runs").addHandler(StepLines())
    began = time.monotonic()
    await rl_loop(TrainingSpec.model_validate(document))
    wall = time.monotonic() - began
    store = Store(bucket)
    history = await read_history(store, lesson.name)
    shares = TimeShares.of(await read_steps(store, lesson.name), history.standing)
    parts = {**shares.seconds, "begin, publish the last version": wall - shares.wall_seconds}
    for what, seconds in parts.items():
        print(f"{percent(seconds, wall):>7}  {duration(seconds):>6}  {what}")
    rest = wall - shares.wall_seconds + shares.orchestration_seconds
    say(f"{duration(wall)}, orchestration {percent(rest, wall)}")
    say(f"page  {lesson.root / 'bucket' / training_page_path(lesson.name)}")


def declared(lesson: Lesson, seed: int, steps_per_version: int) -> dict[str, Any]:
    """The run, as the file that examples/rl_loop.yaml shows."""
    root = lesson.root
    sampling: dict[str, Any] = {
        "completions_per_prompt": lesson.group_size,
        "max_completion_tokens": lesson.max_tokens,
    }
    if lesson.rollout is not None:
        sampling["rollout"] = {"name": lesson.rollout}
    return {
        "cycle": {
            "run_id": lesson.name,
            "service": "demo",
            "store": "demo",
            "rollouts": "demo",
            "work_dir": str(root / "work"),
            "problems": {"dataset": str(root / "problems.jsonl")},
            "readiness": {"poll_interval_seconds": 0.1, "warmup_after_hotload": False},
            "sampling": sampling,
            "reward": {"name": lesson.reward},
        },
        "trainer": {
            "name": "examples.numpy_trainer:open_trainer",
            "arguments": {"base_model": str(root / "policy"), "states": str(root / "states")},
        },
        "windows": {
            "epochs": lesson.epochs,
            "seed": seed,
            "prompt_groups_per_step": lesson.groups_per_step,
            "weight_sync_interval": steps_per_version,
        },
        "loss": {"kl_beta": 0},
        "schedule": {"learning_rate": lesson.learning_rate},
        "step": {"adam": {"beta2": 0.95, "grad_clip_norm": 1.0}},
    }


class StepLines(logging.Handler):
    """Prints what the loop logs of each step."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line that tells of a step."""
        line = record.getMessage()
        if line.startswith("step "):
            print(line, flush=True)


def say(text: str) -> None:
    """One line for the person watching."""
    print(f"learn: {text}", flush=True)
