"""Retention over the life of a run, beside a publisher, and killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import State
from prefect.logging import disable_run_logger

from examples.tiny_trainer import TinyTrainer
from flows.retain import main, retain_what_is_needed
from hotload.clients.store import Store, every_lease, publisher_lease
from hotload.clients.store.retention import pin
from hotload.clients.store.verification import verify_snapshot
from hotload.errors import LeaseLostError, ServiceRefusedError, ServiceUnavailableError
from hotload.identity import version_of
from hotload.publish.retention import Retention
from hotload.publish.snapshot import SnapshotManifest
from hotload.quantities import size
from hotload.spec import RetentionSpec
from tasks.retain import plan_retention
from tests.flows.fleet import SERVICE, Fleet, running_fleet, save_blocks
from tests.programs import running
from tests.tasks.publishing import Publisher
from tests.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("HOTLOAD_KILL_SEED", "7"))
KILLS = int(os.environ.get("HOTLOAD_KILLS", "3"))
LOOK_SECONDS = 0.001
VERSIONS, FULL_EVERY, KEEP = 60, 20, 5


class Run:
    """A run that publishes cheap versions to a fleet with a stub engine."""

    def __init__(self, fleet: Fleet, trainer: TinyTrainer) -> None:
        self.fleet, self._trainer = fleet, trainer
        self.store = Store(fleet.bucket.as_uri())
        (fleet.root / "work").mkdir()
        self.publisher = Publisher(fleet, self.store, fleet.root / "work")
        self.version = 0

    async def publish(self) -> SnapshotManifest:
        """The next version, until every replica serves it."""
        self.version += 1
        self._trainer.step()
        path = self.fleet.checkpoints[0].with_name(f"{self.version:06d}")
        self._trainer.save(path)
        self.fleet.checkpoints.append(path)
        with disable_run_logger():
            return await self.publisher.publish(self.version)

    async def retain(self, *, delete: bool = True, **fields: Any) -> State[Retention]:
        """The flow as a deployment runs it."""
        spec = RetentionSpec(
            services=(self.fleet.name,),
            store=self.fleet.name,
            **{"keep_versions": KEEP, "delete": delete, **fields},
        )
        return await retain_what_is_needed(spec, return_state=True)

    def stored_versions(self) -> list[int]:
        """The policy versions that have a manifest."""
        return sorted(version_of(path.stem, "run") or 0 for path in manifests(self.fleet))

    async def check(self) -> None:
        """Every manifest has its objects, as they were published, and its whole chain."""
        there = {path.stem for path in manifests(self.fleet)}
        for path in manifests(self.fleet):
            manifest = SnapshotManifest.parse(path.read_bytes(), identity=path.stem)
            assert manifest.previous is None or manifest.previous in there, path.stem
            assert await verify_snapshot(self.store, manifest, lambda _: None) == []

    def check_nothing_is_left(self) -> None:
        """What has no manifest has no object and no mark either."""
        there = {path.stem for path in manifests(self.fleet)}
        bucket = self.fleet.bucket
        objects = {path.parent.name for path in bucket.glob("[!_]*/*")}
        assert objects == there
        assert {one.stem for one in (bucket / "_hotload/signals").rglob("*.json")} == there

    def check_replicas_load(self, head: str) -> None:
        """Every replica restarted, and one that joins late, replay the chain to `head`."""
        count = len(self.fleet.replicas())
        for number in range(count):
            order = {"action": "restart", "replica": number}
            self._change(order)
        self._change({"action": "add"})

        def all_serve() -> bool:
            found = self.fleet.replicas()
            assert all(one["loading_state"]["stage"] != "error" for one in found), found
            return len(found) == count + 1 and all(
                one["readiness"] and one["current_snapshot_identity"] == head for one in found
            )

        wait_until(all_serve)
        self._change({"action": "remove", "replica": self.fleet_names()[-1]})

    def fleet_names(self) -> list[str]:
        """The replicas' names, oldest first."""
        return [*self.fleet.log()["snapshots"]]

    def _change(self, order: dict[str, Any]) -> None:
        url = f"{self.fleet.url}/emulator/replicas"
        httpx.post(url, json=order, timeout=PATIENCE_SECONDS).raise_for_status()


def manifests(fleet: Fleet) -> list[Path]:
    return sorted((fleet.bucket / "_hotload" / "snapshots").glob("*.json"))


def bucket_bytes(fleet: Fleet) -> int:
    """All that is stored, but the lease, whose length is its holder's name's."""
    files = (path for path in fleet.bucket.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.parent.name != "leases")


@pytest.fixture
async def run(prefect_api: str, tmp_path: Path) -> AsyncIterator[Run]:
    """A run before its first version."""
    trainer, base = TinyTrainer(), tmp_path / "checkpoints" / "000000"
    trainer.save(base)
    name = f"retained-{uuid.uuid4().hex[:12]}"
    with running_fleet(name, tmp_path, [base], engine="stub") as fleet:
        await save_blocks(fleet)
        yield Run(fleet, trainer)


@pytest.mark.heavy
@pytest.mark.timeout(600)
async def test_sixty_versions_keeping_five(run: Run) -> None:
    """The bucket stays small, and at every moment a fleet can be started anew from it."""
    published = 0
    print(
        f"\nversion  kept      bucket     published   (every {FULL_EVERY}th full, keeping {KEEP})"
    )
    for _ in range(VERSIONS):
        manifest = await run.publish()
        published += manifest.size_bytes
        if run.version % KEEP:
            continue
        before = bucket_bytes(run.fleet)
        dry = await run.retain(delete=False)
        assert bucket_bytes(run.fleet) == before
        state = await run.retain()
        assert (dry.name, state.name) == ("DryRun", "Removed"), state.message
        removed = (await state.result()).removed_bytes
        assert removed == (await dry.result()).removed_bytes <= before - bucket_bytes(run.fleet)
        first = run.version - KEEP + 1
        anchor = first - (first - 1) % FULL_EVERY
        assert run.stored_versions() == [*range(anchor, run.version + 1)]
        await run.check()
        run.check_nothing_is_left()
        if run.version in (5, 20, 25, 40, VERSIONS):
            run.check_replicas_load(manifest.identity)
        kept = len(run.stored_versions())
        sizes = f"{size(bucket_bytes(run.fleet)):>9}  {size(published):>9}"
        print(f"{run.version:>7}  {kept:>4}  {size(before):>9} → {sizes}")
    run.check_replicas_load(manifest.identity)
    assert run.fleet.log()["client_bugs"] == []
    assert bucket_bytes(run.fleet) < published / 2


@pytest.mark.timeout(600)
async def test_killed_at_random_moments_nothing_dangles(run: Run) -> None:
    for _ in range(18):
        manifest = await run.publish()
    assert {one["current_snapshot_identity"] for one in run.fleet.replicas()} == {manifest.identity}
    # A full one in between lets the chain before it go.
    run.publisher = FullNow(run.fleet, run.store, run.publisher.work)
    for _ in range(2):
        manifest = await run.publish()
    pristine = Path(shutil.copytree(run.fleet.bucket, run.fleet.root / "pristine"))
    count = len(manifests(run.fleet))

    def restore() -> None:
        for path in run.fleet.bucket.iterdir():
            shutil.rmtree(path)
        shutil.copytree(pristine, run.fleet.bucket, dirs_exist_ok=True)

    with retaining(run.fleet) as process:
        assert process.wait(PATIENCE_SECONDS) == 0, process.communicate()
    kept = run.stored_versions()
    assert kept == [19, 20]

    # On a busy machine a kill may come after the end: so many are tried that half of them strike.
    rng = random.Random(SEED)
    kills = struck = 0
    while kills < KILLS or struck < KILLS // 2:
        assert kills < 5 * KILLS, f"{struck} of {kills} kills came in time"
        kills += 1
        restore()
        standing = rng.randrange(len(kept) + 1, count)
        with retaining(run.fleet) as process:
            look(process, until=lambda most=standing: len(manifests(run.fleet)) <= most)
            process.send_signal(signal.SIGKILL)
            process.wait()
        left = run.stored_versions()
        struck += len(left) > len(kept)
        await run.check()
        print(f"  killed at {standing} of {count} manifests: {len(left)} stand")
        state = await run.retain(keep_versions=1)  # its lease is taken over at once
        assert state.name == "Removed", state.message
        assert run.stored_versions() == kept
        await run.check()
        run.check_nothing_is_left()
    run.check_replicas_load(manifest.identity)


def look(process: subprocess.Popen[str], *, until: Callable[[], bool]) -> None:
    """Look at the bucket until it is so, or the process has ended."""
    while not until() and process.poll() is None:
        time.sleep(LOOK_SECONDS)


class FullNow(Publisher):
    """A publisher that goes full."""

    def spec(self, version: int, **changes: Any) -> Any:
        force = version == 19
        return super().spec(version, cadence={"force_full": force}, **changes)


def retaining(fleet: Fleet) -> AbstractContextManager[subprocess.Popen[str]]:
    """`python -m flows.retain --delete`, keeping one version, as a process."""
    names = ["--service", fleet.name, "--store", fleet.name]
    return running("flows.retain", *names, "--keep", "1", "--delete")


# Beside a publisher, and where what is served is not known


async def test_it_refuses_while_a_publisher_holds_the_lease_and_a_publisher_while_it_does(
    run: Run,
) -> None:
    await run.publish()
    rest = run.fleet.bucket / "_hotload/signals/run-000009-00000000.json"
    rest.write_text("{}")  # of a removal that was broken off
    async with publisher_lease(run.store, SERVICE, "run-000002"):
        assert (await run.retain(delete=False)).name == "DryRun"  # looking needs no lease
        state = await run.retain()
        with pytest.raises(LeaseLostError, match="held by 'run-000002'"):
            await state.result()
    assert rest.exists()
    assert (await run.retain()).name == "Removed"
    assert not rest.exists()
    async with every_lease(run.store, []):
        with pytest.raises(LeaseLostError, match="held by 'retention'"):
            async with publisher_lease(run.store, SERVICE, "run-000002"):
                pass


async def test_a_service_that_does_not_say_what_it_serves_is_a_refusal(run: Run) -> None:
    await run.publish()
    spec = RetentionSpec(keep_versions=1)
    service, fleet = run.publisher.service, run.fleet
    with disable_run_logger():
        fleet.fault(fault="respond", operation="status", status=503, count=1)
        with pytest.raises(ServiceUnavailableError, match="of local/rollouts, so what it serves"):
            await plan_retention.fn(spec, [service], run.store)
        fleet.fault(fault="empty_replicas", count=1)
        with pytest.raises(ServiceUnavailableError, match="lists no replica"):
            await plan_retention.fn(spec, [service], run.store)
        other = fleet.root / "other"
        other.mkdir()
        with pytest.raises(ServiceRefusedError, match="the service reads"):
            await plan_retention.fn(spec, [service], Store(other.as_uri()))


async def test_a_manifest_that_cannot_be_read_holds_it_back_and_the_state_says_so(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        manifest = await run.publish()
    broken = run.fleet.bucket / "_hotload/snapshots/run-000009-00000000.json"
    broken.write_text("{")
    state = await run.retain(keep_versions=1)
    assert state.name == "HeldBack"
    assert "run-000009-00000000" in str(state.message)
    names = ["--service", run.fleet.name, "--store", run.fleet.name]
    assert await asyncio.to_thread(main, [*names, "--keep", "1"]) == 1
    assert "in doubt: the manifest of run-000009-00000000" in capsys.readouterr().out
    broken.unlink()
    assert manifest.identity in {path.stem for path in manifests(run.fleet)}


async def test_the_program_prints_bytes_money_and_what_stays_by_whose_word(
    run: Run, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.publisher = FullNow(run.fleet, run.store, run.publisher.work)
    first, _, _ = [await run.publish() for _ in range(3)]
    run.version = 18
    run.fleet.checkpoints.extend([run.fleet.checkpoints[-1]] * 15)
    await run.publish()  # full
    await pin(run.store, first.identity)
    names = ["--service", run.fleet.name, "--store", run.fleet.name]
    before = bucket_bytes(run.fleet)
    line = [*names, "--keep", "1", "--price", "0.02"]
    assert await asyncio.to_thread(main, line) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(first.identity in one and "pinned" in one for one in printed)
    assert any("stays  served by local/rollouts" in one for one in printed)
    assert any(
        one.startswith("to be removed: 2 snapshots, ") and "a month" in one for one in printed
    )
    assert bucket_bytes(run.fleet) == before
    reports = run.fleet.bucket / "_hotload/reports"
    reports.mkdir()
    for version in (1, 2):
        (reports / f"run-{version:06d}.json").write_text("{}")
    line += ["--keep-reports", "1", "--delete"]
    assert await asyncio.to_thread(main, line) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "run-000001: report, metrics and rollouts, 2 B, removed" in printed
    assert any(
        one.startswith("removed: 2 snapshots, the files of 1 old cycle, ") for one in printed
    )
    assert [path.name for path in reports.iterdir()] == ["run-000002.json"]
    assert run.stored_versions() == [1, 19]
    asked = {"artifacts": {"key": {"any_": [f"hotload-retention-{run.fleet.name}"]}}}
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS) as http:
        answer = await http.post(f"{prefect_api}/artifacts/filter", json=asked)
    shown = answer.raise_for_status().json()
    rows = json.loads(max(shown, key=lambda one: one["created"])["data"])
    assert [row["stays"] for row in rows] == [False, False, True, True]
    assert rows[-1]["why"] == "served by local/rollouts"


@pytest.mark.parametrize(
    "wrong", [["--price", "-1"], ["--keep", "0"], ["--keep", "many"], ["--grace-hours", "nan"]]
)
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert wrong[1] in capsys.readouterr().err


async def test_a_block_that_is_not_there_is_one_line(
    prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["--store", "nobody-saved-this"]) == 2
    assert "error: " in capsys.readouterr().err
