"""The asynchronous loop against the one with windows: samples that are trained on per second, where
an answer takes 2 s and an optimizer step takes 2 s. Waiting costs no CPU; the ratio holds.

    python -m benchmarks.async_loop
    python -m benchmarks.async_loop --steps 16 --ahead 1
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.numpy_trainer import NumpyTrainer, open_trainer
from examples.processes import emulator, prefect_server
from hotload.training.step_record import StepRecord

BAR = 1.7
GROUPS, SAMPLES, TOKENS = 4, 8, 4
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--account", "bench", "--model", "tiny", "--deployment", "fleet"]


def open_slow_trainer(base_model: str, states: str, seconds: float) -> NumpyTrainer:
    """The numpy trainer, whose optimizer step waits."""
    trainer = open_trainer(base_model, states)
    step = trainer.step

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return step(*args, **kwargs)

    trainer.step = slow  # type: ignore[method-assign]
    return trainer


def declared(root: Path, options: argparse.Namespace, ahead: int) -> dict[str, Any]:
    """One run; `ahead` versions, or 0 for windows of one step."""
    return {
        "cycle": {
            "run_id": "bench",
            **dict.fromkeys(("service", "store", "rollouts"), "demo"),
            "work_dir": str(root / "work"),
            "problems": {"dataset": str(root / "problems.jsonl")},
            "readiness": {"poll_interval_seconds": 0.1, "warmup_after_hotload": False},
            "sampling": {
                "completions_per_prompt": SAMPLES,
                "max_completion_tokens": TOKENS,
                "concurrency": {"mode": "fixed", "initial_window": 64},
                **({"max_head_offpolicy_versions": ahead} if ahead else {}),
            },
            "reward": {"name": "regex", "arguments": {"pattern": "[0-4]"}},
        },
        "trainer": {
            "name": "benchmarks.async_loop:open_slow_trainer",
            "arguments": {
                "base_model": str(root / "base"),
                "states": str(root / "states"),
                "seconds": options.trainer,
            },
        },
        "windows": {"prompt_groups_per_step": GROUPS},
        "loss": {"kl_beta": 0},
    }


async def run_loop(service: str, root: Path, options: argparse.Namespace, ahead: int) -> float:
    """Run one loop; returns trained samples a second."""
    from examples.five_cycles import declare_blocks
    from flows.async_rl_loop import async_rl_loop
    from flows.rl_loop import rl_loop
    from hotload.clients.store import Store
    from hotload.clients.store.step_records import read_steps
    from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec

    bucket = (root / "bucket").as_uri()
    await declare_blocks(service, bucket, NAMES)
    document = declared(root, options, ahead)
    began = time.perf_counter()
    if ahead:
        await async_rl_loop(AsyncTrainingSpec.model_validate(document))
    else:
        await rl_loop(TrainingSpec.model_validate(document))
    seconds = time.perf_counter() - began
    records = await read_steps(Store(bucket), "bench")
    return print_run(f"{ahead} ahead" if ahead else "in turns", records, seconds)


def print_run(name: str, records: Sequence[StepRecord], seconds: float) -> float:
    """Print what a loop did; returns trained samples a second."""
    figures = [one.figures for one in records]
    rate = sum(one["rollout/filtered_samples"] for one in figures) / seconds
    waited = [
        sum(one[f"perf/{who}_wait_time"] for one in figures) / len(figures)
        for who in ("train", "sampler")
    ]
    lag = max(one["async/version_offset_max"] for one in figures)
    print(
        f"{name:>9}: {len(records)} steps in {seconds:.1f} s, {rate:.2f} trained samples/s; "
        f"trainer waited {waited[0]:.1f} s a step, sampler {waited[1]:.1f}; lag at most {lag:g}",
        flush=True,
    )
    return rate


def main() -> None:
    """Run both loops and print their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ahead", type=int, default=2, help="versions")
    parser.add_argument("--answer", type=float, default=2.0, help="seconds of an answer")
    parser.add_argument("--trainer", type=float, default=2.0, help="seconds of a step")
    options = parser.parse_args()
    rates = []
    with (
        tempfile.TemporaryDirectory() as directory,
        prefect_server(Path(directory) / "prefect"),
    ):
        from examples.tiny_trainer import TinyTrainer

        for ahead in (0, options.ahead):
            root = Path(directory) / f"ahead-{ahead}"
            (root / "bucket").mkdir(parents=True)
            TinyTrainer().save(root / "base")
            rows = ({"id": f"p{n}", "prompt": f"{n} = "} for n in range(options.steps * GROUPS))
            (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            fleet = [*FLEET, "--seconds-per-token", str(options.answer / TOKENS)]
            bucket = (root / "bucket").as_uri()
            with emulator(bucket, root / "base", root / "emulator.log", fleet) as service:
                rates.append(asyncio.run(run_loop(service, root, options, ahead)))
    print(f"asynchronous over in turns: {rates[1] / rates[0]:.2f} (bar {BAR})")


if __name__ == "__main__":
    main()
