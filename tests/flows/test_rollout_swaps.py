"""Rollouts that go on while others publish, and rollouts that are killed: whole cycles against a
real Prefect server, emulator and bucket.
"""

import asyncio
import json
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.cycle import checkpoint_to_rollout
from hotload.dataset.rollout_plan import RolloutManifest
from hotload.dataset.table import check_rollouts
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import CycleProcess
from tests.waiting import until

KILLS = int(os.environ.get("HOTLOAD_KILLS", "2"))
SEED = int(os.environ.get("HOTLOAD_KILL_SEED", "7"))
PROBLEMS = 12

pytestmark = [
    pytest.mark.timeout(600),
    # Prefect leaves its own connections to its API to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
async def slow_fleet(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> AsyncIterator[Fleet]:
    """Two replicas that take 0.04 s for a token."""
    name = f"fleet-{uuid.uuid4().hex[:12]}"
    with running_fleet(name, tmp_path, checkpoints, seconds_per_token=0.04) as running:
        await save_blocks(running)
        yield running


def spec(fleet: Fleet, version: int, tokens: int = 4, **sampling: Any) -> CycleSpec:
    """A cycle over 12 problems, two samples each, a part per problem."""
    problems = fleet.root / "many.jsonl"
    rows = ({"id": f"sum-{n}", "prompt": f"{n} + 1 = ", "answer": ""} for n in range(PROBLEMS))
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return fleet.spec(
        version,
        problems={"dataset": str(problems)},
        sampling={
            "completions_per_prompt": 2,
            "max_completion_tokens": tokens,
            "problems_per_task": 1,
            **sampling,
        },
    )


def directory(fleet: Fleet, version: int) -> Path:
    """Where the rollouts of a version lie."""
    (found,) = (fleet.bucket / "_hotload" / "rollouts").glob(f"run-{version:06d}-*")
    return found


def rows(fleet: Fleet, version: int) -> pl.DataFrame:
    """The rows that the manifest of a version names, once it says that these are all."""
    where = directory(fleet, version)
    manifest = RolloutManifest.parse((where / "manifest.json").read_bytes(), path="manifest")
    assert manifest.is_complete
    assert {part.file for part in manifest.parts} == {path.name for path in where.glob("part-*")}
    frames = [check_rollouts(pl.read_parquet(where / part.file)) for part in manifest.parts]
    return pl.concat(frames).sort("problem_id", "sample_number")


async def test_the_next_cycles_publish_while_the_first_one_samples(slow_fleet: Fleet) -> None:
    """Three versions, at most one ahead: what the first has not begun by then is stale."""
    fleet = slow_fleet
    records = fleet.bucket / "_hotload"
    slow = spec(fleet, 1, 64, max_head_offpolicy_versions=1, concurrency={"max_concurrency": 2})
    first = asyncio.create_task(checkpoint_to_rollout(slow))

    def parts_of_first() -> int:
        return len(list((records / "rollouts").glob("run-000001-*/part-*")))

    async def is_published_and_sampled() -> bool:
        return (records / "publications" / "run-000001.json").exists() and parts_of_first() > 0

    await until(is_published_and_sampled)
    second: CycleReport = await checkpoint_to_rollout(spec(fleet, 2))
    parts = parts_of_first()

    async def has_sampled_from_second() -> bool:
        # One problem at a time: what ends second from now on was begun after the swap.
        return parts_of_first() >= parts + 2

    await until(has_sampled_from_second)
    assert not first.done()
    assert second.rollouts.samples_by_identity == {second.snapshot.identity: 24}
    third: CycleReport = await checkpoint_to_rollout(spec(fleet, 3))
    report: CycleReport = await first

    identities = [each.snapshot.identity for each in (report, second, third)]
    found = rows(fleet, 1)
    assert found.height == report.rollouts.sample_count == 2 * PROBLEMS
    assert found["problem_id"].n_unique() == PROBLEMS
    stale = found.filter(failure="stale")
    assert stale.height > 0
    assert report.rollouts.groups.groups_by_mark["stale"] == stale.height // 2
    assert report.rollouts.failed_samples == {"stale": stale.height}
    assert set(stale["mark"]) == {"stale"}
    answered = found.filter(pl.col("failure").is_null())
    # Stamped with what was served when it was begun, which moves on with the service.
    assert answered["identity"][0] == identities[0] or identities[0] in set(answered["identity"])
    assert set(answered["identity"]) <= set(identities)
    assert set(answered["first_identity"]) >= {identities[0], identities[1]}
    assert report.rollouts.groups.straddling_samples == answered.filter(weights="straddling").height

    # Every request the emulator saw stands in one of the reports.
    log = Counter(entry["status"] for entry in fleet.samples_asked())
    reports = [report, second, third]
    assert sum(each.rollouts.groups.attempts for each in reports) == sum(log.values())
    failed = sum(sum(each.rollouts.groups.failed_attempts.values()) for each in reports)
    assert failed == sum(log.values()) - log[200]
    samples = sum(each.rollouts.sample_count for each in reports)
    assert log[200] == samples - stale.height


async def test_a_killed_cycle_samples_on_although_another_has_published(
    slow_fleet: Fleet,
) -> None:
    fleet = slow_fleet
    declared = spec(fleet, 1, max_head_offpolicy_versions=2, concurrency={"max_concurrency": 1})
    process = CycleProcess(fleet, declared)
    try:
        parts = fleet.bucket / "_hotload" / "rollouts"
        assert process.reaches(lambda _: len(list(parts.glob("*/part-*"))) >= 3)
        process.kill()
    finally:
        process.stop()
    before = {path: path.stat().st_mtime_ns for path in directory(fleet, 1).glob("part-*")}
    asked = len(fleet.samples_asked())
    assert 3 <= len(before) < PROBLEMS

    second: CycleReport = await checkpoint_to_rollout(spec(fleet, 2))
    asked_by_second = len(fleet.samples_asked()) - asked
    report: CycleReport = await checkpoint_to_rollout(declared)

    found = rows(fleet, 1)
    assert found["failure"].is_null().all()
    assert Counter(found["problem_id"]) == {f"sum-{n}": 2 for n in range(PROBLEMS)}
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    resumed = len(fleet.samples_asked()) - asked - asked_by_second
    assert resumed == 2 * (PROBLEMS - len(before))
    # The weights were loaded once; what was sampled after the kill came from the later ones.
    assert [note["identity"] for note in fleet.log()["signals"]] == [
        report.snapshot.identity,
        second.snapshot.identity,
    ]
    assert report.rollouts.samples_by_identity == {
        report.snapshot.identity: 2 * len(before),
        second.snapshot.identity: resumed,
    }


@pytest.mark.timeout(400 + 30 * KILLS)
async def test_killed_at_random_moments_the_union_is_that_of_a_clean_run(
    slow_fleet: Fleet, prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> None:
    fleet = slow_fleet
    declared = spec(fleet, 1, concurrency={"max_concurrency": 2})
    rng = random.Random(SEED)
    kills = sorted(rng.sample(range(PROBLEMS - 1), KILLS))
    for count in kills:
        process = CycleProcess(fleet, declared)
        try:

            def has_parts(_: CycleProcess, count: int = count) -> bool:
                found = fleet.bucket.glob("_hotload/rollouts/*/part-*")
                return len(list(found)) >= count

            if process.reaches(has_parts):
                print(f"\n  killed with {count} parts: {process.kill()}")
        finally:
            process.stop()
    await checkpoint_to_rollout(declared)

    clean_root = tmp_path / "clean"
    clean_root.mkdir()
    with running_fleet(f"{fleet.name}-clean", clean_root, checkpoints) as clean:
        await save_blocks(clean)
        await checkpoint_to_rollout(spec(clean, 1))
        told = "problem_id sample_number seed identity request_id session_id prompt_token_ids"
        told += " token_ids sampling_logprobs text reward advantage mark failure"
        assert rows(fleet, 1).select(told.split()).equals(rows(clean, 1).select(told.split()))
