"""One checkpoint to several services: one upload, and each service its own chain and fallback."""

from __future__ import annotations

import asyncio
import html
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import State

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.cycle import checkpoint_to_rollout
from flows.rollback import roll_back
from hotload.clients.handoff import RolloutReader, Store
from hotload.clients.store.records import SIGNALS
from hotload.errors import ServiceRefusedError, ServicesFailedError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tests.flows.fleet import API_KEY, NAMES, Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import CycleProcess
from tests.programs import running
from tests.signals import signals_are_heard
from tests.waiting import PATIENCE_SECONDS, until, wait_until

REPLICAS = 3
IMPATIENT = {
    "poll_interval_seconds": 0.05,
    "weight_sync_timeout": 20,
    "scale_up_timeout_seconds": 0.2,
    "warmup_after_hotload": False,
}


@dataclass
class Fleets:
    """Services that load from one bucket; the first one's rollouts are sampled."""

    all: list[Fleet]

    @property
    def first(self) -> Fleet:
        return self.all[0]

    def declared(self, version: int, **changes: Any) -> dict[str, Any]:
        others = [one.name for one in self.all[1:]]
        asked = {"other_services": others, "readiness": IMPATIENT, **changes}
        return self.first.declared(version, **asked)

    async def cycle(self, version: int, **changes: Any) -> tuple[str | None, CycleReport]:
        """Run a cycle; returns the name of its state, and its report."""
        spec = CycleSpec.model_validate(self.declared(version, **changes))
        state: State[CycleReport] = await checkpoint_to_rollout(spec, return_state=True)
        return state.name, await state.result()

    def served(self) -> list[set[str | None]]:
        return [one.served() for one in self.all]

    def signals(self) -> list[list[str]]:
        return [[note["identity"] for note in one.log()["signals"]] for one in self.all]

    def bugs(self) -> list[Any]:
        return [bug for one in self.all for bug in one.log()["client_bugs"]]

    def stored_shards(self) -> dict[Path, int]:
        """Size of every object of a snapshot in the bucket."""
        return {
            path: path.stat().st_size
            for path in self.first.bucket.rglob("*")
            if path.is_file() and "_hotload" not in path.parts
        }


def service_name(number: int) -> str:
    return f"local/{NAMES['deployment_id']}-{number}"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def fleets(
    prefect_api: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: list[Path],
    opened: ExitStack,
) -> Fleets:
    """Two services of three replicas on one bucket."""
    return await open_fleets(2, tmp_path, tmp_path_factory, checkpoints, opened)


async def open_fleets(
    count: int,
    root: Path,
    elsewhere: pytest.TempPathFactory,
    checkpoints: list[Path],
    opened: ExitStack,
) -> Fleets:
    name, all_ = f"fleet-{uuid.uuid4().hex[:12]}", list[Fleet]()
    bucket = (root / "bucket").as_uri()
    for number in range(count):
        names = {**NAMES, "deployment_id": service_name(number).partition("/")[2]}
        place = root if not number else elsewhere.mktemp("other")
        settings = {"bucket": bucket, "replica_count": REPLICAS, **names}
        one = opened.enter_context(
            running_fleet(f"{name}-{number}", place, checkpoints, **settings)
        )
        fleet = replace(one, names=names)
        await save_blocks(fleet)
        all_.append(fleet)
    return Fleets(all_)


class Counting:
    """Counts what a cycle reads, encodes and uploads, at the doors where it does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import tasks.encode
        import tasks.validate
        from hotload.clients.store.local_directory import LocalDirectory
        from hotload.directory.file_digests import FileDigests

        self._sums: Counter[str] = Counter()
        self._lock = threading.Lock()
        digest, encode, put = FileDigests.of, tasks.encode.encode_file, LocalDirectory.put_file

        def of(digests: Any, path: Path) -> str:
            if path.parent.name.isdecimal() and digests.known(path) is None:  # the trainer's
                self._count("read", path)
            return digest(digests, path)

        def encode_file(base: Path, target: Path, out: Path, **options: Any) -> Any:
            self._count("encoded", target)
            return encode(base, target, out, **options)

        async def put_file(directory: Any, local: Path, path: str) -> None:
            self._count("uploaded", local)
            await put(directory, local, path)

        patch.setattr(FileDigests, "of", of)
        patch.setattr(tasks.encode, "encode_file", encode_file)
        patch.setattr(LocalDirectory, "put_file", put_file)

    def taken(self) -> tuple[int, int, int]:
        """Bytes read of the trainer's files, encoded, and uploaded since the last look."""
        sums, self._sums = self._sums, Counter()
        return sums["read"], sums["encoded"], sums["uploaded"]

    def _count(self, what: str, path: Path) -> None:
        with self._lock:  # files are read and encoded on threads
            self._sums[what] += path.stat().st_size


async def test_two_services_are_served_from_one_upload(
    fleets: Fleets, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    counting, alone = Counting(monkeypatch), [(0, 0, 0)]
    settings = {"replica_count": REPLICAS}
    root, checkpoints = tmp_path_factory.mktemp("alone"), fleets.first.checkpoints
    with running_fleet(f"{fleets.first.name}-alone", root, checkpoints, **settings) as one:
        await save_blocks(one)
        counting.taken()
        for version in (1, 2):
            await checkpoint_to_rollout(one.spec(version))
            alone.append(counting.taken())
    for version, kind in ((1, SnapshotKind.FULL), (2, SnapshotKind.DELTA)):
        name, report = await fleets.cycle(version)
        identity = report.snapshot.identity
        assert (name, report.snapshot.kind) == ("Completed", kind)
        assert fleets.served() == [{identity}, {identity}]
        counted = counting.taken()
        print(f"version {version}, bytes read, encoded, uploaded: {counted}; one: {alone[version]}")
        assert counted == alone[version]
        assert [one.snapshot and one.snapshot.replica_count for one in report.services] == [3, 3]
        assert [one.service for one in report.services] == [service_name(0), service_name(1)]
    assert [len(sent) for sent in fleets.signals()] == [2, 2]
    assert fleets.bugs() == []


async def test_one_that_fails_falls_back_alone(fleets: Fleets) -> None:
    await fleets.cycle(1)
    fleets.all[1].fault(fault="torn_apply", replica="replica-1", count=1)
    name, report = await fleets.cycle(2)
    first, second = (one.snapshot for one in report.services)
    assert first is not None
    assert second is not None
    assert (first.kind, second.kind) == (SnapshotKind.DELTA, SnapshotKind.FULL)
    assert fleets.served() == [{first.identity}, {second.identity}]
    assert report.services[0].fallback is None
    assert "error" in str(report.services[1].fallback)
    page = (fleets.first.bucket / f"_hotload/reports/{report.name}.html").read_text()
    for service, text in report.services_in_words.items():
        assert service in page
        assert text in html.unescape(page)
    assert (name, report.snapshot.identity) == ("CompletedByFallback", first.identity)
    # They stand apart now: each is sent a delta on what its own replicas serve.
    _, third = await fleets.cycle(3)
    previous = [one.snapshot.previous for one in third.services if one.snapshot]
    assert previous == [first.identity, second.identity]
    assert fleets.bugs() == []


async def test_services_at_different_places_get_what_each_can_load(fleets: Fleets) -> None:
    for version in (1, 2):
        await fleets.cycle(version, other_services=[])
    _, report = await fleets.cycle(3)
    first, second = (one.snapshot for one in report.services)
    assert first is not None
    assert second is not None
    assert (first.kind, second.kind) == (SnapshotKind.DELTA, SnapshotKind.FULL)
    assert fleets.served() == [{first.identity}, {second.identity}]
    baselines = Path(fleets.declared(3)["work_dir"]) / service_name(0) / "baseline"
    assert {path.name for path in baselines.iterdir()} == {first.identity, second.identity}
    # Both have the same bytes, which lie there once.
    same = [[p.stat().st_ino for p in sorted(one.iterdir())] for one in baselines.iterdir()]
    assert same[0] == same[1]
    _, report = await fleets.cycle(4)
    assert [one.snapshot and one.snapshot.kind for one in report.services] == ["delta", "delta"]
    assert fleets.bugs() == []


async def test_a_service_that_joins_is_served_what_lies_in_the_store(fleets: Fleets) -> None:
    _, alone = await fleets.cycle(1, other_services=[])
    before = fleets.stored_shards()
    name, report = await fleets.cycle(1)
    assert name == "ServedAgain"
    assert fleets.served() == [{alone.snapshot.identity}] * 2
    assert fleets.stored_shards() == before
    assert [len(sent) for sent in fleets.signals()] == [1, 1]
    assert report.rollouts == alone.rollouts
    assert (await fleets.cycle(1))[0] == "AlreadyServed"


async def test_only_the_service_that_lost_it_is_served_again(fleets: Fleets) -> None:
    await fleets.cycle(1)
    await fleets.cycle(2)
    sent = fleets.signals()
    await (await HotLoadService.load(fleets.all[1].name)).open().reset_ledger()
    name, report = await fleets.cycle(2)
    assert name == "ServedAgain"
    assert fleets.signals()[0] == sent[0]
    assert len(fleets.signals()[1]) == len(sent[1]) + 1
    assert fleets.served()[1] == {s.identity if (s := report.services[1].snapshot) else None}


REFUSED = {"fault": "respond", "operation": "signal", "status": 403}


async def test_all_fails_and_says_which(fleets: Fleets) -> None:
    fleets.all[1].fault(**REFUSED)
    with pytest.raises(ServicesFailedError, match=rf"2 of 2.*{service_name(1)}: .*403"):
        await fleets.cycle(1)
    # The other one was not held up; started again, the cycle finds it served.
    assert len(fleets.served()[0]) == 1
    assert fleets.served()[0] != {None}
    fleets.all[1].clear_faults()
    name, report = await fleets.cycle(1)
    assert (name, fleets.served()) == ("Completed", [{report.snapshot.identity}] * 2)
    assert len(fleets.signals()[0]) == 1


async def test_any_goes_on_without_the_one_that_failed(fleets: Fleets) -> None:
    fleets.all[1].fault(**REFUSED)
    name, report = await fleets.cycle(1, required="any")
    assert name == "CompletedInPart"
    assert "403" in str(report.services[1].failure)
    assert fleets.served() == [{report.snapshot.identity}, {None}]
    assert report.rollouts.group_count == 4
    fleets.all[1].clear_faults()
    name, report = await fleets.cycle(2, required="any")
    assert (name, fleets.served()[0]) == ("Completed", {report.snapshot.identity})
    assert report.services[1].snapshot is not None
    assert report.services[1].snapshot.kind is SnapshotKind.FULL


async def test_those_that_stand_apart_keep_each_its_base_on_nodes_too(fleets: Fleets) -> None:
    # Nodes that nobody has made: the cycle's own process does their work, side by side.
    placed = {"placement": {"gone-0": [], "gone-1": []}, "required": "any"}
    _, first = await fleets.cycle(1, **placed)
    fleets.all[1].fault(**REFUSED)
    _, second = await fleets.cycle(2, **placed)
    fleets.all[1].clear_faults()
    name, third = await fleets.cycle(3, **placed)
    previous = [one.snapshot and one.snapshot.previous for one in third.services]
    assert previous == [second.snapshot.identity, first.snapshot.identity]
    assert (name, [one.fallback for one in third.services]) == ("Completed", [None, None])
    assert fleets.bugs() == []


async def test_any_does_not_sample_from_one_that_failed(fleets: Fleets) -> None:
    fleets.first.fault(**REFUSED)
    with pytest.raises(ServicesFailedError, match="one that is sampled"):
        await fleets.cycle(1, required="any")


async def test_sampling_begins_while_another_service_is_still_under_way(fleets: Fleets) -> None:
    second = fleets.all[1]
    second.fault(fault="lagging_replica", replica="replica-0")
    cycle = asyncio.create_task(fleets.cycle(1, required="any"))
    try:
        sampled = len(await until(lambda: _requests(fleets.first, 8)))
        still_on = second.served()
    finally:
        second.clear_faults()
    name, report = await cycle
    assert (sampled, still_on) == (8, {None, report.snapshot.identity})
    assert (name, second.served()) == ("Completed", {report.snapshot.identity})


async def _requests(fleet: Fleet, count: int) -> list[Any]:
    requests = await asyncio.to_thread(fleet.samples_asked)
    return requests if len(requests) >= count else []


async def test_a_quorum_is_more_than_half(
    prefect_api: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: list[Path],
    opened: ExitStack,
) -> None:
    three = await open_fleets(3, tmp_path, tmp_path_factory, checkpoints, opened)
    three.all[2].fault(**REFUSED)
    name, report = await three.cycle(1, required="quorum")
    assert (name, report.failed_services.partition(":")[0]) == ("CompletedInPart", service_name(2))
    three.all[1].fault(**REFUSED)
    with pytest.raises(ServicesFailedError, match="2 of 3"):
        await three.cycle(2, required="quorum")


@signals_are_heard()
def test_ctrl_c_gives_every_lease_back(fleets: Fleets) -> None:
    fleets.all[1].fault(fault="lagging_replica", replica="replica-0")
    file = fleets.first.root / "cycle.yaml"
    spec = CycleSpec.model_validate(fleets.declared(1))
    file.write_text(yaml.safe_dump({"cycle": spec.model_dump(mode="json")}))
    with running("flows", str(file)) as process:
        wait_until(lambda: process.poll() is not None or fleets.first.served() != {None})
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert told.endswith("stopped; start it again to go on\n")
    assert [lease["released"] for lease in fleets.first.leases()] == [True, True]


async def test_a_rollback_takes_every_service(fleets: Fleets) -> None:
    for version in (1, 2):
        await fleets.cycle(version)
    spec = CycleSpec.model_validate(fleets.declared(2))
    await roll_back(spec, "1")
    served = fleets.served()
    assert served[0] == served[1]
    assert str(served[0].pop()).startswith("run-000001-")
    assert fleets.bugs() == []


@pytest.mark.parametrize("moment", ["signalled", "served"])
async def test_a_killed_cycle_resumes_each_service_from_its_own_state(
    fleets: Fleets, moment: str
) -> None:
    await fleets.cycle(1)
    # The second is held up, so that the two stand apart when the cycle dies.
    fleets.all[1].fault(fault="respond", operation="signal", status=503)
    spec = CycleSpec.model_validate(fleets.declared(2))
    process = CycleProcess(fleets.first, spec)
    first = fleets.first
    reached: Callable[[CycleProcess], bool] = {
        "signalled": lambda _: len(first.log()["signals"]) == 2,
        "served": lambda _: all(str(one).startswith("run-000002") for one in first.served()),
    }[moment]
    try:
        assert process.reaches(reached)
        process.kill()
    finally:
        process.stop()
    fleets.all[1].clear_faults()
    _, report = await fleets.cycle(2)
    sent = [identity for identity in fleets.signals()[0] if identity.startswith("run-000002")]
    assert sent == [report.snapshot.identity]  # the first was not signalled twice
    served = [one.snapshot.identity for one in report.services if one.snapshot]
    assert fleets.served() == [{served[0]}, {served[1]}]
    assert fleets.bugs() == []


async def test_marks_and_leases_name_the_service(fleets: Fleets) -> None:
    _, report = await fleets.cycle(1)
    mark = f"{report.snapshot.identity}.json"
    for number in range(2):
        assert (fleets.first.bucket / SIGNALS / service_name(number) / mark).exists()
    assert {lease["service"] for lease in fleets.first.leases()} == {
        service_name(0),
        service_name(1),
    }
    assert all(lease["released"] for lease in fleets.first.leases())


async def test_a_mark_without_a_service_counts_for_every_service(fleets: Fleets) -> None:
    """An earlier version wrote it: a delta that it may have signalled is not sent again."""
    await fleets.cycle(1)
    fleets.all[1].fault(**REFUSED)
    _, report = await fleets.cycle(2, required="any")
    for place in (fleets.first.bucket / SIGNALS / "local").iterdir():
        for mark in place.glob("run-000002-*"):
            mark.rename(fleets.first.bucket / SIGNALS / mark.name)
    fleets.all[1].clear_faults()
    _, again = await fleets.cycle(2)
    second = again.services[1].snapshot
    assert second is not None
    assert (second.kind, second.identity == report.snapshot.identity) == (SnapshotKind.FULL, False)


async def test_all_are_sampled_by_weight_each_under_what_it_serves(fleets: Fleets) -> None:
    """The second falls back, so that the two serve one version under names of their own."""
    await fleets.cycle(1)
    fleets.all[1].fault(fault="torn_apply", replica="replica-1", count=1)
    before = [len(one.samples_asked()) for one in fleets.all]
    first, second = (one.name for one in fleets.all)
    name, report = await fleets.cycle(
        2,
        rollout_weights={first: 3, second: 1},
        sampling={"completions_per_prompt": 2, "max_completion_tokens": 4, "problems_per_task": 1},
    )
    after = [len(one.samples_asked()) for one in fleets.all]
    assert [now - then for then, now in zip(before, after, strict=True)] == [6, 2]
    identities = [one.snapshot.identity for one in report.services if one.snapshot]
    assert name == "CompletedByFallback"
    assert len(set(identities)) == 2
    assert report.rollouts.samples_by_identity == dict(zip(identities, [6, 2], strict=True))
    assert report.rollouts.failed_samples == {}
    assert await asyncio.to_thread(_versions_read, fleets.first) == {2}


def _versions_read(fleet: Fleet) -> set[int]:
    """What a trainer takes: the policy versions behind all groups."""
    reader = RolloutReader(Store(fleet.bucket.as_uri()), "run", 2, consumer="trainer")
    versions: set[int] = set()
    with reader.blocking() as deliveries:
        for delivery in deliveries:
            versions |= {*delivery.frame["policy_version"]}
            deliveries.acknowledge(delivery)
    return versions


async def test_the_share_of_a_service_that_failed_goes_to_the_others(fleets: Fleets) -> None:
    fleets.first.fault(**REFUSED)
    first, second = fleets.all
    weights = {first.name: 1.0, second.name: 1.0}
    name, report = await fleets.cycle(1, required="any", rollout_weights=weights)
    assert (name, report.rollouts.sample_count) == ("CompletedInPart", 8)
    assert [len(one.samples_asked()) for one in fleets.all] == [0, 8]
    assert report.snapshot.identity in second.served()
    assert report.rollouts.identity == report.snapshot.identity


async def test_a_named_service_alone_is_sampled(fleets: Fleets) -> None:
    _, report = await fleets.cycle(1, rollout_weights={fleets.all[1].name: 1})
    assert [len(one.samples_asked()) for one in fleets.all] == [0, 8]
    assert report.rollouts.sample_count == 8


async def test_two_blocks_of_one_service_are_refused(fleets: Fleets) -> None:
    twin = f"{fleets.first.name}-twin"
    for block in fleets.first.blocks():
        if isinstance(block, HotLoadService):
            await block.save(twin)
    with pytest.raises(ServiceRefusedError, match=f"both of {service_name(0)}"):
        await fleets.cycle(1, other_services=[twin])


async def test_rollouts_of_none_of_the_services_are_refused(fleets: Fleets) -> None:
    names = {**NAMES, "deployment_id": "elsewhere"}
    account = InferenceAccount(base_url=fleets.first.url, api_key=API_KEY, **names)
    other = f"{fleets.first.name}-elsewhere"
    await RolloutClient(account=account).save(other)
    with pytest.raises(ServiceRefusedError, match="none of the services"):
        await fleets.cycle(1, rollouts=other)
    assert fleets.signals() == [[], []]


async def test_an_unknown_block_is_named(fleets: Fleets) -> None:
    with pytest.raises(ValueError, match="nobody-saved-this"):
        await fleets.cycle(1, other_services=["nobody-saved-this"])
