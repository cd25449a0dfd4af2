"""Lines: a trainer that resumes from an earlier version goes on, and all that reads follows it."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import State

from flows.cycle import checkpoint_to_rollout
from flows.rollback import roll_back
from hotload.clients.handoff import RolloutReader, Store
from hotload.errors import IdentityConflictError, InvalidIdentityError
from hotload.identity import SnapshotKind, line_of, version_of
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import Fleet
from tests.flows.killed_cycle import CycleProcess
from tests.flows.test_cycle import answer
from tests.flows.test_served import reset

FORK = 3


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Versions 3 to 6 as a trainer writes them that resumed at 2 and learnt something else."""
    from examples.tiny_trainer import TinyTrainer

    trainer, directory = TinyTrainer(), tmp_path_factory.mktemp("resumed")
    for _ in range(6):
        trainer.step()
    paths = {version: directory / f"{version:06d}" for version in range(FORK, FORK + 4)}
    for path in paths.values():
        trainer.save(path)
        trainer.step()
    return paths


async def run(fleet: Fleet, version: int, **changes: Any) -> tuple[str | None, CycleReport]:
    """Run a cycle; returns the name of its state, and its report."""
    state: State[CycleReport] = await checkpoint_to_rollout(
        fleet.spec(version, **changes), return_state=True
    )
    return state.name, await state.result()


def of_line(resumed: dict[int, Path], version: int, line: int = 1) -> dict[str, Any]:
    return {"checkpoint": str(resumed[version]), "line": line}


async def rewound(fleet: Fleet, resumed: dict[int, Path], last: int) -> dict[int, CycleReport]:
    """Versions 1 to 4, then 3 to `last` of line 1; the reports of the latter."""
    for version in (1, 2, 3, 4):
        await run(fleet, version)
    return {
        version: (await run(fleet, version, **of_line(resumed, version)))[1]
        for version in range(FORK, last + 1)
    }


async def taken(fleet: Fleet, version: int, line: int | None = None) -> set[str]:
    """The identities of the samples that a reader gets of this version."""
    store = Store(fleet.bucket.as_uri())
    frames = []
    async with RolloutReader(store, "run", version, consumer="trainer", line=line) as reader:
        async for delivery in reader:
            frames.append(delivery.frame)
    return set(pl.concat(frames)["identity"])


async def test_a_trainer_that_went_back_is_told_the_remedy(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    for version in (1, 2, 4):
        await run(fleet, version)
    other = str(resumed[4])
    with pytest.raises(IdentityConflictError, match=r"raise `line` to 1"):
        await checkpoint_to_rollout(fleet.spec(4, checkpoint=other))
    with pytest.raises(InvalidIdentityError, match=r"serves version 4 .* raise `line` to 1"):
        await checkpoint_to_rollout(fleet.spec(3, checkpoint=other))
    assert len(fleet.log()["signals"]) == 3


async def test_a_line_goes_on_where_the_replicas_are(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    reports = await rewound(fleet, resumed, 5)
    names = sorted(report.name for report in fleet.reports())
    old = [f"run-{version:06d}" for version in (1, 2, 3, 4)]
    assert names == sorted([*old, *(f"run-{version:06d}.1" for version in reports)])
    snapshots = [report.snapshot for report in reports.values()]
    assert {one.kind for one in snapshots} == {SnapshotKind.DELTA}
    last_of_0 = next(one for one in fleet.reports() if one.name == "run-000004").snapshot
    before = [last_of_0.identity, *(one.identity for one in snapshots)]
    assert [one.previous for one in snapshots] == before[:-1]
    assert fleet.served() == {snapshots[-1].identity}
    assert fleet.log()["client_bugs"] == []
    # The same problems with the same seeds as the version has had before.
    rows = {
        line: pl.read_parquet(
            fleet.bucket / "_hotload" / "rollouts" / identity / "part-00000-00.parquet"
        ).select("problem_id", "sample_number", "seed")
        for line, identity in enumerate(
            one.snapshot.identity for one in fleet.reports() if one.policy_version == FORK
        )
    }
    assert rows[0].equals(rows[1])
    # What reads follows the line; the old one is there by name.
    assert [await taken(fleet, version) for version in (2, 3, 4)] == [
        {next(one for one in fleet.reports() if one.name == "run-000002").snapshot.identity},
        {reports[3].snapshot.identity},
        {reports[4].snapshot.identity},
    ]
    assert await taken(fleet, 4, line=0) == {last_of_0.identity}
    history = json.loads((fleet.bucket / "_hotload" / "runs" / "run.json").read_bytes())
    shown = [(one["line"], one["policy_version"]) for one in history["versions"]]
    assert shown == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (1, 5)]
    page = (fleet.bucket / "_hotload" / "runs" / "run.html").read_text()
    assert page.count("superseded") == 2
    metrics = (fleet.bucket / "_hotload" / "metrics" / "run-000003.1.jsonl").read_text()
    assert json.loads(metrics.splitlines()[-1])["line"] == 1


async def test_a_line_that_was_killed_is_asked_for_again(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    for version in (1, 2, 3):
        await run(fleet, version)
    declared = fleet.spec(FORK, **of_line(resumed, FORK))
    process = CycleProcess(fleet, declared)
    assert process.reaches(lambda one: one.has_said(f"'plan-{declared.name}' - Finished"))
    process.kill()
    with pytest.raises(InvalidIdentityError, match="line 1 "):  # begun, whatever became of it
        await checkpoint_to_rollout(fleet.spec(4))
    name, report = await run(fleet, FORK, **of_line(resumed, FORK))
    assert (name, fleet.served()) == ("Completed", {report.snapshot.identity})
    signals = len(fleet.log()["signals"])
    assert await run(fleet, FORK, **of_line(resumed, FORK)) == ("AlreadyServed", report)
    assert len(fleet.log()["signals"]) == signals
    assert fleet.log()["client_bugs"] == []


async def test_a_trainer_of_an_older_line_changes_nothing(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    reports = await rewound(fleet, resumed, 3)
    served, signals = fleet.served(), len(fleet.log()["signals"])
    for version in (2, 3, 4):
        assert (await run(fleet, version))[0] == "Superseded"
    words = r"line 1 .* began at version 3.*stop this trainer.*`line: 2`"
    with pytest.raises(InvalidIdentityError, match=words):
        await checkpoint_to_rollout(fleet.spec(5))
    assert (fleet.served(), len(fleet.log()["signals"])) == (served, signals)
    # Nor does it when the replicas have lost everything, and the store alone knows of the line.
    await reset(fleet)
    for version in (4, 5):
        with pytest.raises(InvalidIdentityError, match=words):
            await checkpoint_to_rollout(fleet.spec(version))
    assert fleet.served() == {None}
    name, again = await run(fleet, 3, **of_line(resumed, 3))
    assert (name, again.rollouts) == ("ServedAgain", reports[3].rollouts)


async def test_a_line_begins_with_its_own_weights_although_none_is_due(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    cadence = {"cadence": {"weight_sync_interval": 4}}
    await run(fleet, 4, **cadence)
    first = (await run(fleet, 3, **of_line(resumed, 3), **cadence))[1]
    assert (line_of(first.snapshot.identity), first.outcome) == (1, "published")
    second = (await run(fleet, 5, **of_line(resumed, 5), **cadence))[1]
    assert (second.snapshot.identity, second.outcome) == (first.snapshot.identity, "not due")
    assert second.rollouts.parts_uri.endswith(f"{first.snapshot.identity}/000005.1")
    assert await taken(fleet, 5) == {first.snapshot.identity}


async def test_back_to_a_version_is_to_that_of_the_current_line(
    fleet: Fleet, resumed: dict[int, Path]
) -> None:
    answers = {}
    for version in (1, 2, 3, 4):
        await run(fleet, version)
        answers[0, version] = answer(fleet)
    for version in (3, 4):
        await run(fleet, version, **of_line(resumed, version))
        answers[1, version] = answer(fleet)
    for version, line in ((3, 1), (2, 0)):
        back = await roll_back(fleet.spec(4), str(version))
        assert (line_of(back.identity), version_of(back.identity)) == (line, version)
        assert answer(fleet) == answers[line, version]
    superseded = next(one for one in fleet.reports() if one.name == "run-000004")
    back = await roll_back(fleet.spec(4), superseded.snapshot.identity)
    assert (line_of(back.identity), answer(fleet)) == (0, answers[0, 4])
    with pytest.raises(InvalidIdentityError, match="line 1 "):
        await checkpoint_to_rollout(fleet.spec(5))
    following = (await run(fleet, 5, **of_line(resumed, 5)))[1]
    assert following.snapshot.previous == back.identity
    assert fleet.served() == {following.snapshot.identity}
    assert fleet.log()["client_bugs"] == []
