"""The stage of the rollout examples: a fleet, a Prefect server, and cycles of a policy that learns.

Three replicas serve real weights; each cycle publishes the policy, plays, and hands its groups
back; a reader takes them and the policy takes a step. Everything lies in `.demo/<name>/`, made anew
by every run; only loopback is used.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from examples.processes import emulator, prefect_server

if TYPE_CHECKING:  # prefect reads its settings when it is imported, and those are made below
    from hotload.report.cycle_report import CycleReport

DEMO = Path(__file__).resolve().parents[2] / ".demo"
NAMES = {"account_id": "demo", "model_id": "speaker", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--account", "demo", "--model", "speaker", "--deployment", "fleet"]
GROUP_SIZE = 8
CYCLES = 4


@dataclass(frozen=True)
class Show:
    """One example: its problems, its rollout function, and what its policy says at first.

    `words` are texts with the bias, in nats, that their tokens begin with.
    """

    name: str
    module: str
    problems: Sequence[Mapping[str, Any]]
    max_tokens: int
    words: Mapping[str, float]

    @property
    def root(self) -> Path:
        """Where everything lies."""
        return DEMO / self.name


def main(show: Show) -> None:
    """Run the show from the command line; 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {show.module}", description=f"{CYCLES} cycles of the {show.name} example."
    )
    parser.add_argument("--cycles", type=int, default=CYCLES, help="(%(default)s)")
    cycles = parser.parse_args().cycles
    # SIGTERM and a closed terminal end it as Ctrl-C does: through every `finally`.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        run(show, cycles)
    except KeyboardInterrupt:
        say("stopped; every process of the show has ended")
        sys.exit(130)


def run(show: Show, cycles: int) -> None:
    """Some cycles from nothing, told on the terminal."""
    started = time.monotonic()
    shutil.rmtree(show.root, ignore_errors=True)
    bucket = show.root / "bucket"
    bucket.mkdir(parents=True)
    problems = "".join(json.dumps(problem) + "\n" for problem in show.problems)
    (show.root / "problems.jsonl").write_text(problems)
    say(f"{show.name}: {len(show.problems)} problems, {GROUP_SIZE} samples each, {cycles} cycles")
    with prefect_server(show.root / "prefect"):
        from examples.rollouts.speaker import Speaker

        policy = Speaker(dict(show.words))
        policy.save(show.root / "checkpoints" / "000000")
        log = show.root / "emulator.log"
        with emulator(bucket.as_uri(), show.root / "checkpoints" / "000000", log, FLEET) as url:
            asyncio.run(play(show, policy, url, cycles))
    say(f"{time.monotonic() - started:.0f} s with both servers' start")
    for page in sorted((bucket / "_hotload" / "reports").glob("*.html")):
        say(f"page    {page}")
    say(f"data    {bucket / '_hotload' / 'rollouts'}")


async def play(show: Show, policy: Any, url: str, cycles: int) -> None:
    """Publish, play, learn; as often as asked."""
    from examples.five_cycles import declare_blocks
    from flows.cycle import checkpoint_to_rollout
    from hotload.clients.handoff import RolloutReader, Store
    from hotload.spec import CycleSpec

    bucket = (show.root / "bucket").as_uri()
    await declare_blocks(url, bucket, NAMES)
    for version in range(1, cycles + 1):
        checkpoint = show.root / "checkpoints" / f"{version:06d}"
        policy.save(checkpoint)
        spec = CycleSpec.model_validate(declared(show, checkpoint, version))
        report = await checkpoint_to_rollout(spec)
        frames = []
        async with RolloutReader(Store(bucket), show.name, version, consumer="example") as reader:
            async for delivery in reader:
                frames.append(delivery.frame)
                await reader.acknowledge(delivery)
        rows = pl.concat(frames)
        tell(report, rows)
        policy.learn(rows)


def declared(show: Show, checkpoint: Path, version: int) -> dict[str, Any]:
    """The cycle of one checkpoint."""
    return {
        "checkpoint": str(checkpoint),
        "run_id": show.name,
        "policy_version": version,
        "service": "demo",
        "store": "demo",
        "rollouts": "demo",
        "work_dir": str(show.root / "work"),
        "problems": {"dataset": str(show.root / "problems.jsonl")},
        "readiness": {"poll_interval_seconds": 0.1, "warmup_after_hotload": False},
        "sampling": {
            "completions_per_prompt": GROUP_SIZE,
            "max_completion_tokens": show.max_tokens,
            "rollout": {"name": f"{show.module}:rollout"},
            "groups": {"max_incomplete_group_retries": 1},
        },
        "reward": {"name": f"{show.module}:reward"},
    }


def tell(report: "CycleReport", rows: pl.DataFrame) -> None:
    """One cycle for a person: its numbers, and the best conversation."""
    rollouts, snapshot = report.rollouts, report.snapshot
    samples = rows.filter(pl.col("segment_number") == 0)
    mean = rollouts.mean_reward or 0.0
    turns = samples["turn_count"].sum() / samples.height
    print()
    say(
        f"{snapshot.identity}  {snapshot.kind.value}  1 : {snapshot.ratio:.0f}  "
        f"reward {mean:.3f} {'█' * round(40 * mean)}"
    )
    say(
        f"{rollouts.group_count} groups, {rollouts.sample_count} samples, "
        f"{turns:.1f} turns and "
        f"{rows.height / samples.height:.1f} sequences each, {report.seconds:.1f} s"
    )
    best = samples.filter(pl.col("reward") == pl.col("reward").max()).row(0, named=True)
    for message in json.loads(best["transcript"] or "[]"):
        print(f"      {message['role']:>9}  {message['content']!r}")
    parts = ", ".join(f"{part['name']} {part['value']:.2f}" for part in best["reward_parts"])
    print(f"      {'reward':>9}  {best['reward']:.2f} ({parts})")


def say(text: str) -> None:
    """One line for the person watching."""
    print(f"show: {text}", flush=True)
