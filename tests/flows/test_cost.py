"""Cost decides: full or delta by what each would move, and the dry run that shows it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from blocks.checkpoint_store import CheckpointStore
from examples.tiny_trainer import TinyTrainer
from flows.cycle import checkpoint_to_rollout
from flows.plan import preview_publication
from hotload.cli.cost_table import preview_lines
from hotload.clients.store import publisher_lease
from hotload.directory.files import sha256_file
from hotload.errors import InvalidCheckpointError, InvalidIdentityError
from hotload.identity import SnapshotKind
from hotload.publish.cost import PublicationPreview
from tests.flows.fleet import NAMES, SERVICE, Fleet

FULL, DELTA = SnapshotKind.FULL, SnapshotKind.DELTA


def other_weights(fleet: Fleet) -> str:
    """A checkpoint of the same shapes that no step leads to."""
    directory = fleet.root / "other-weights"
    TinyTrainer(seed=8).save(directory)
    return str(directory)


async def test_other_weights_go_out_as_a_full_and_a_step_as_a_delta(fleet: Fleet) -> None:
    """Row 9 of the list: other weights went out as a delta of 1 : 1.24."""
    await checkpoint_to_rollout(fleet.spec(1))
    step = await checkpoint_to_rollout(fleet.spec(2))
    assert step.snapshot.kind is DELTA
    assert re.search("; a delta would move .{1,3} % of the bytes of a full$", step.snapshot.reason)
    other = await checkpoint_to_rollout(fleet.spec(3, checkpoint=other_weights(fleet)))
    assert (other.outcome, other.snapshot.kind) == ("published", FULL)
    assert re.fullmatch(
        "a delta would move 8. % of the bytes of a full: it is worth its place in the chain "
        "below 75 %",
        other.snapshot.reason,
    )
    assert fleet.served() == {other.snapshot.identity}


def files(*roots: Path) -> dict[str, tuple[str, int]]:
    """Every file with its digest and the moment it was last written."""
    found = sorted(path for root in roots for path in root.rglob("*") if path.is_file())
    return {str(path): (sha256_file(path), path.stat().st_mtime_ns) for path in found}


@contextmanager
def untouched(fleet: Fleet) -> Iterator[None]:
    """Nothing in the bucket or the work directory changes, and no signal leaves."""
    roots = fleet.bucket, fleet.root / "work"
    before, signals = files(*roots), fleet.log()["signals"]
    yield
    assert files(*roots) == before
    assert fleet.log()["signals"] == signals


async def preview(fleet: Fleet, version: int, **changes: object) -> PublicationPreview:
    with untouched(fleet):
        (preview,) = (await preview_publication(fleet.spec(version, **changes))).values()
        return preview


async def test_a_dry_run_says_what_the_cycle_then_does(fleet: Fleet) -> None:
    prices = {"per_gb_egress": 90.0, "per_gb_month": 20.0}
    first = await preview(fleet, 1)
    assert first.plan is not None
    assert [one.kind for one in first.options] == [FULL]
    assert first.served == "base weights on 2"
    reports = [await checkpoint_to_rollout(fleet.spec(1))]
    for version in (2, 3):
        found = await preview(fleet, version, prices=prices)
        reports.append(await checkpoint_to_rollout(fleet.spec(version, prices=prices)))
        snapshot = reports[-1].snapshot
        assert found.plan is not None
        assert (found.plan.identity, found.plan.reason) == (snapshot.identity, snapshot.reason)
        full, delta = found.options
        assert delta.size_bytes == pytest.approx(snapshot.size_bytes, rel=0.05)
        assert delta.egress_bytes == 2 * delta.size_bytes
        assert full.size_bytes == reports[0].snapshot.size_bytes
        earlier = sum(one.snapshot.size_bytes for one in reports[:-1])
        assert delta.replay_bytes == earlier + delta.size_bytes
        assert full.seconds is not None
        assert (delta.seconds is None) == (version == 2)  # until one was timed
        assert full.money is not None
        # 2.5 MB at 20 a month, and 2 replicas and a twentieth of a third at 90
        assert full.money == pytest.approx(full.size_bytes / 1e9 * (20 + 90 * 2.05))
    lines = list(preview_lines(found))
    assert lines[0] == f"delta {reports[-1].snapshot.identity}"
    assert lines[3].split() == ["bytes", "egress", "late", "joiner", "time", "money"]
    assert [line[:7].split() for line in lines[4:]] == [["full"], ["*", "delta"]]


async def test_a_dry_run_of_other_weights_chooses_the_full(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(1))
    found = await preview(fleet, 2, checkpoint=other_weights(fleet))
    assert found.plan is not None
    assert found.plan.kind is FULL
    assert "below 75 %" in found.plan.reason
    assert [one.kind for one in found.options] == [FULL, DELTA]


async def test_a_dry_run_needs_no_lease_and_of_an_ended_cycle_says_so(fleet: Fleet) -> None:
    report = await checkpoint_to_rollout(fleet.spec(1))
    store = (await CheckpointStore.load(fleet.name)).open()
    async with publisher_lease(store, SERVICE, "another-cycle"):
        assert (await preview(fleet, 2)).options
    ended = await preview(fleet, 1)
    assert (ended.plan, ended.options) == (None, ())
    (line,) = preview_lines(ended)
    assert report.snapshot.identity in line


async def test_what_lies_in_the_store_is_not_uploaded_again(fleet: Fleet) -> None:
    report = await checkpoint_to_rollout(fleet.spec(1))
    (fleet.bucket / "_hotload/reports/run-000001.json").unlink()
    found = await preview(fleet, 1)
    assert found.plan is not None
    assert (found.plan.identity, found.options) == (report.snapshot.identity, ())
    assert next(preview_lines(found)).startswith("nothing to upload: full run-000001-")


async def test_a_manifest_that_cannot_be_read_stays_where_it_is(fleet: Fleet) -> None:
    report = await checkpoint_to_rollout(fleet.spec(1))
    manifest = fleet.bucket / f"_hotload/snapshots/{report.snapshot.identity}.json"
    manifest.write_text("{}")
    found = await preview(fleet, 2)
    assert found.plan is not None
    assert found.plan.kind is FULL
    assert any(report.snapshot.identity in note and "set-aside" in note for note in found.notes)
    cycle = await checkpoint_to_rollout(fleet.spec(2))
    assert cycle.snapshot.identity == found.plan.identity
    assert not manifest.exists()


async def test_a_base_that_lies_elsewhere_is_not_fetched(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(1))
    shutil.rmtree(fleet.root / "work")
    found = await preview(fleet, 2)
    assert found.plan is not None
    assert (found.plan.kind, [one.kind for one in found.options]) == (DELTA, [FULL])
    assert "the base is not in work_dir" in found.notes[0]
    assert not (fleet.root / "work").exists()


async def test_a_dry_run_refuses_what_the_cycle_would(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(2))
    with untouched(fleet), pytest.raises(InvalidIdentityError, match="already serves version 2"):
        await preview_publication(fleet.spec(1))
    broken = Path(shutil.copytree(fleet.checkpoints[3], fleet.root / "broken"))
    (broken / "config.json").unlink()
    with untouched(fleet), pytest.raises(InvalidCheckpointError, match=r"config\.json"):
        await preview_publication(fleet.spec(3, checkpoint=str(broken)))


async def test_a_fleet_that_is_not_complete_is_noted(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(1))
    found = await preview(fleet, 2, readiness={"replica_count": 5})
    assert any("2 of 5 replicas are listed" in note for note in found.notes)


async def test_a_history_that_says_nonsense_decides_nothing(fleet: Fleet) -> None:
    for version in (1, 2):
        await checkpoint_to_rollout(fleet.spec(version))
    path = fleet.bucket / "_hotload/runs/run.json"
    history = json.loads(path.read_bytes())
    for row in history["versions"]:
        row |= {"publish_seconds": 1e308, "converge_seconds": 1e308}
    path.write_text(json.dumps(history))
    found = await preview(fleet, 3)
    assert [one.seconds for one in found.options] == [None, None]
    path.write_text("[]")
    found = await preview(fleet, 3)
    assert found.plan is not None
    assert found.plan.kind is DELTA


def test_the_command(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.plan import main

    file = fleet.root / "cycle.yaml"
    account = {"base_url": fleet.url, **NAMES}
    blocks = {"account": account, "store": {"url": fleet.bucket.as_uri()}}
    names = ("service", "store", "rollouts")
    cycle = {key: value for key, value in fleet.declared(1).items() if key not in names}
    file.write_text(yaml.safe_dump({"blocks": blocks, "cycle": cycle}))
    monkeypatch.setenv("FIREWORKS_API_KEY", "key-that-must-not-be-shown")
    monkeypatch.setattr(sys, "argv", ["plan", str(file)])
    with untouched(fleet):
        assert main() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("full run-000001-")
    assert out[1] == "why: not every replica serves one snapshot of ours"
    assert out[-1].split()[:3] == ["*", "full", "2.5"]
    file.write_text(yaml.safe_dump({"cycle": cycle | {"prices": {"per_gb_egress": -1}}}))
    assert main() == 2
    assert "prices.per_gb_egress" in capsys.readouterr().err
