"""The demo's story: a first full, two deltas, a delta that one replica cannot merge, one more
delta."""

import json
from pathlib import Path

import httpx

from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from examples.tiny_trainer import TinyTrainer
from flows.cycle import checkpoint_to_rollout
from hotload.quantities import size
from hotload.report.cycle_report import CycleReport
from hotload.rollout.counts import join_counts
from hotload.spec import CycleSpec

CYCLES = 5
TORN_VERSION = 4
PROBLEMS = 12


def write_checkpoints(directory: Path, count: int = CYCLES) -> list[Path]:
    """The base model and `count` steps after it, each a whole checkpoint directory."""
    trainer = TinyTrainer()
    paths = [directory / f"{version:06d}" for version in range(count + 1)]
    for path in paths:
        trainer.save(path)
        trainer.step()
    return paths


async def run_cycles(
    root: Path, service_url: str, checkpoints: list[Path], names: dict[str, str]
) -> list[CycleReport]:
    """One cycle per checkpoint after the base; a replica's merge is broken before the fourth."""
    await declare_blocks(service_url, (root / "bucket").as_uri(), names)
    reports = []
    for version in range(1, len(checkpoints)):
        if version == TORN_VERSION:
            await break_next_merge(service_url)
        report = await checkpoint_to_rollout(spec_of(root, checkpoints, version))
        reports.append(report)
        how = "full, after a fallback" if report.fallback_reason else report.snapshot.kind.value
        print(f"demo: {report.snapshot.identity}  {how}  {report.seconds:.1f} s", flush=True)
    return reports


async def declare_blocks(service_url: str, bucket: str, names: dict[str, str]) -> None:
    """Save the three blocks that the cycles name, and the account that two of them share."""
    account = InferenceAccount(base_url=service_url, api_key="local-demo-key", **names)
    await account.save("demo", overwrite=True)
    await HotLoadService(account=account).save("demo", overwrite=True)
    await CheckpointStore(url=bucket).save("demo", overwrite=True)
    await RolloutClient(account=account).save("demo", overwrite=True)


def spec_of(root: Path, checkpoints: list[Path], version: int) -> CycleSpec:
    """The cycle of one checkpoint."""
    problems = root / "problems.jsonl"
    problems.write_text("".join(problem_lines(PROBLEMS)))
    return CycleSpec.model_validate(
        {
            "checkpoint": str(checkpoints[version]),
            "run_id": "demo",
            "policy_version": version,
            "service": "demo",
            "store": "demo",
            "rollouts": "demo",
            "work_dir": str(root / "work"),
            "problems": {"dataset": str(problems)},
            "readiness": {"poll_interval_seconds": 0.1, "warmup_after_hotload": False},
            "sampling": {"completions_per_prompt": 4, "max_completion_tokens": 16, "seed": 7},
            "reward": {"name": "examples.rewards:letters"},
        }
    )


def problem_lines(count: int) -> list[str]:
    """Sums as a JSON-lines problem file."""
    return [
        json.dumps(
            {"id": f"sum-{n}", "prompt": f"What is {n} + {n + 3}? ", "answer": str(2 * n + 3)}
        )
        + "\n"
        for n in range(count)
    ]


async def break_next_merge(service_url: str) -> None:
    """Ask the emulator to let one replica fail its next merge."""
    fault = {"fault": "torn_apply", "replica": "replica-1", "count": 1}
    async with httpx.AsyncClient(timeout=60) as client:
        (await client.post(f"{service_url}/emulator/faults", json=fault)).raise_for_status()


HEADINGS = (
    "identity", "kind", "bytes", "ratio", "encode", "upload", "converge", "rollouts", "total",
    "replicas", "groups", "reward",
)  # fmt: skip
STAGES = ("encode", "upload", "converge")


def table(reports: list[CycleReport]) -> str:
    """All cycles for a person: one row each, with why it was full or a delta below."""
    rows = [_cells(report) for report in reports]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = ["", _row(HEADINGS, widths), "  ".join("─" * width for width in widths)]
    for report, row in zip(reports, rows, strict=True):
        rollouts = report.rollouts
        lines += [_row(row, widths), f"    why      {report.snapshot.reason}"]
        lines += [f"    samples  {join_counts(rollouts.samples_by_identity)}"]
    return "\n".join(
        [*lines, "", "Times in seconds; encode and upload are summed over shards.", ""]
    )


def _cells(report: CycleReport) -> tuple[str, ...]:
    snapshot, rollouts, took = report.snapshot, report.rollouts, report.snapshot.seconds_by_stage
    fell_back = "full (fallback)" if report.fallback_reason else snapshot.kind.value
    mean = "–" if rollouts.mean_reward is None else f"{rollouts.mean_reward:.3f}"
    return (
        snapshot.identity,
        fell_back,
        size(snapshot.size_bytes),
        f"{snapshot.ratio:.1f}",
        *(f"{took[stage]:.2f}" if stage in took else "–" for stage in STAGES),
        f"{rollouts.seconds:.2f}",
        f"{report.seconds:.2f}",
        str(snapshot.replica_count),
        str(rollouts.group_count),
        mean,
    )


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
