"""Snapshots and old cycles read, removed, pinned and verified, on every kind of store."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from hotload.clients.store import Store, every_lease, publisher_lease
from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.publisher_leases import lease_log
from hotload.clients.store.records import mark_signalled, write_manifest
from hotload.clients.store.retention import (
    pin,
    read_old_cycles,
    read_pins,
    read_stored_snapshots,
    remove_cycles,
    remove_snapshots,
    unpin,
)
from hotload.clients.store.verification import PIECE_BYTES, verify_snapshot
from hotload.errors import LeaseLostError, StoreError
from hotload.publish.lease import RETENTION
from hotload.publish.retention import ManifestState, Retention, decide_retention
from hotload.publish.snapshot import Shard, SnapshotManifest
from hotload.records import FileDigest
from tests.factories import snapshot_manifest
from tests.flows.fleet import SERVICE

# gcsfs hands aiohttp pieces of 8 MiB as bytes, on an event loop of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
RECORD = "_hotload/snapshots/{}.json"


def name(version: int, run: str = "run") -> str:
    return f"{run}-{version:06d}-0000000{version % 10}"


def content(identity: str, file: str, size_bytes: int) -> bytes:
    return (f"{identity}/{file} " * (size_bytes // 8 + 1)).encode()[:size_bytes]


async def publish(
    store: Store, version: int, previous: int | None = None, *, sizes: Sequence[int] = (200, 0)
) -> SnapshotManifest:
    """Store a snapshot as a publisher does: objects, manifest, mark."""
    identity = name(version)
    shards, side_files = [], []
    for number, size_bytes in enumerate(sizes):
        file = f"model-{number:05d}.safetensors"
        data = content(identity, file, size_bytes)
        digest = hashlib.sha256(data).hexdigest()
        await store.put_bytes(data, f"{identity}/{file}")
        shards.append(
            Shard(
                file=file,
                size_bytes=size_bytes,
                sha256=digest,
                content_size_bytes=size_bytes,
                content_sha256=digest,
            )
        )
    config = b"{}"
    await store.put_bytes(config, f"{identity}/config.json")
    digest = hashlib.sha256(config).hexdigest()
    side_files.append(FileDigest(file="config.json", size_bytes=2, sha256=digest))
    manifest = snapshot_manifest(
        identity,
        previous=None if previous is None else name(previous),
        policy_version=version,
        anchor=identity if previous is None else name(1),
        chain_length=0 if previous is None else version - 1,
        shards=tuple(shards),
        side_files=tuple(side_files),
    )
    await write_manifest(store, manifest)
    await mark_signalled(store, SERVICE, identity)
    return manifest


async def fill(store: Store) -> None:
    """A full and two deltas on it, a full and a delta after it."""
    for version, previous in ((1, None), (2, 1), (3, 2)):
        await publish(store, version, previous)
    await publish(store, 4)
    await write_manifest(store, snapshot_manifest(name(5), previous=name(4), policy_version=5))


def decide(stored: Sequence[object], keep: int = 2, grace_seconds: float = 3600.0) -> Retention:
    return decide_retention(
        stored,  # type: ignore[arg-type]
        served={},
        pins=(),
        keep_versions=keep,
        grace_seconds=grace_seconds,
    )


async def always() -> None:
    """Hold the lease, so to speak."""


async def identities(store: Store) -> set[str]:
    """What has an object or a record; a directory that a kill left empty is neither."""
    objects = [one.path.split("/") for one in await store.objects("")]
    places = {first for first, *_ in objects if not first.startswith("_")}
    records = [
        *await store.names("_hotload/snapshots"),
        *await store.names(f"_hotload/signals/{SERVICE}"),
    ]
    return places | {one.removesuffix(".json") for one in records}


async def dangling(store: Store) -> list[str]:
    """Objects that a manifest names and the store has not, and chains that lack a link."""
    lacking = []
    manifests = await store.names("_hotload/snapshots")
    for file in manifests:
        data = await store.read_bytes(f"_hotload/snapshots/{file}", limit_bytes=1 << 20)
        manifest = SnapshotManifest.parse(data, identity=file.removesuffix(".json"))
        if manifest.previous and f"{manifest.previous}.json" not in manifests:
            lacking.append(f"{manifest.identity} follows {manifest.previous}")
        for one in manifest.shards:
            if await store.size(f"{manifest.identity}/{one.file}") != one.size_bytes:
                lacking.append(f"{manifest.identity}/{one.file}")
    return lacking


async def test_what_is_stored_is_read_and_what_goes_is_gone(store: Store) -> None:
    await fill(store)
    await store.put_bytes(b"half", f"{name(6)}/model-00000.safetensors")
    await store.put_bytes(b"not ours", "base-model/config.json")
    stored = await read_stored_snapshots(store)
    assert [one.identity for one in stored] == [name(n) for n in (1, 2, 3, 4, 5, 6)]
    assert [one.state for one in stored] == [ManifestState.READ] * 5 + [ManifestState.MISSING]
    assert stored[2].needs == (name(2), name(1))
    assert [one.size_bytes for one in stored] == [202, 202, 202, 202, 0, 4]
    assert stored[5].age_seconds < 3600
    retention = decide(stored)
    assert [one.identity for one in retention.removed] == [name(3), name(2), name(1)]
    await remove_snapshots(store, retention.removed, always)
    assert await identities(store) - {"base-model"} == {name(4), name(5), name(6)}
    assert await store.size("base-model/config.json") == 8
    assert await dangling(store) == []
    await remove_snapshots(store, retention.removed, always)  # again: nothing to do


@pytest.mark.parametrize("looks", [1, 2])
async def test_a_manifest_goes_before_its_objects_and_its_mark_after_them(
    store: Store, looks: int
) -> None:
    """Lost after any look: no manifest without its objects, and the next run finishes."""
    await fill(store)
    retention = decide(await read_stored_snapshots(store))
    count = 0

    class KilledError(Exception):
        pass

    async def kill() -> None:
        nonlocal count
        count += 1
        if count > looks:  # the manifest is gone, then the objects are, and the mark is not
            raise KilledError

    for left in (3, 2, 1):
        count = 0
        with pytest.raises(KilledError):
            await remove_snapshots(store, retention.removed[-left:], kill)
        assert await dangling(store) == []
        stored = await read_stored_snapshots(store)
        (rest,) = [one for one in stored if one.state is ManifestState.MISSING]
        assert rest.was_signalled
        retention = decide(stored)
        assert rest in retention.removed  # at once, whatever its age
        await remove_snapshots(store, [rest], always)
        retention = decide(await read_stored_snapshots(store))
    assert await identities(store) == {name(4), name(5)}


@pytest.mark.parametrize("deletions", range(15))
async def test_cancelled_after_any_deletion_nothing_dangles(
    file_store: Store, deletions: int
) -> None:
    await fill(file_store)
    retention = decide(await read_stored_snapshots(file_store))
    count = len(await file_store.objects(""))
    removing = asyncio.ensure_future(remove_snapshots(file_store, retention.removed, always))
    while len(await file_store.objects("")) > count - deletions:
        pass
    removing.cancel()
    await asyncio.gather(removing, return_exceptions=True)
    assert await dangling(file_store) == []
    again = decide(await read_stored_snapshots(file_store))
    await remove_snapshots(file_store, again.removed, always)
    assert await identities(file_store) == {name(4), name(5)}


async def test_an_upload_under_way_stays_and_one_given_up_goes(store: Store) -> None:
    await store.put_bytes(b"half", f"{name(6)}/model-00000.safetensors")
    (upload,) = await read_stored_snapshots(store)
    assert not decide([upload], grace_seconds=3600).removed
    assert decide([upload], grace_seconds=0).removed == (upload,)
    await remove_snapshots(store, [upload], always)
    assert await identities(store) == set()


@pytest.mark.parametrize(
    ("data", "state", "needs"),
    [
        (b"{", ManifestState.UNREADABLE, ()),
        (b"[]", ManifestState.UNREADABLE, ()),
        (b"[" * 100_000, ManifestState.UNREADABLE, ()),
        (b'{"schema_number": 1}', ManifestState.UNREADABLE, ()),
        (b'{"schema_number": "9"}', ManifestState.UNREADABLE, ()),
        (
            json.dumps({"schema_number": 2, "bases": [{"from": name(2)}], name(3): 1}).encode(),
            ManifestState.NEWER,
            (name(2), name(3)),
        ),
    ],
)
async def test_a_manifest_that_is_not_ours_to_read(
    store: Store, data: bytes, state: ManifestState, needs: tuple[str, ...]
) -> None:
    await fill(store)
    await store.put_bytes(b"object", f"{name(9)}/model.safetensors")
    await store.put_bytes(data, RECORD.format(name(9)))
    stored = {one.identity: one for one in await read_stored_snapshots(store)}
    assert (stored[name(9)].state, stored[name(9)].needs) == (state, needs)
    assert stored[name(9)].size_bytes == 6
    retention = decide([*stored.values()])
    kept = {row.snapshot.identity for row in retention.rows if row.is_kept}
    if state is ManifestState.UNREADABLE:
        assert not retention.removed
        assert name(9) in retention.obstacles[0]
    else:
        assert kept >= {name(1), name(2), name(3), name(9)}


async def test_a_manifest_of_another_identity_cannot_be_read(store: Store) -> None:
    await write_manifest(store, snapshot_manifest(name(1)))
    other = snapshot_manifest(name(2)).render()
    await store.put_bytes(other, RECORD.format(name(3)))
    (_, broken) = await read_stored_snapshots(store)
    assert broken.state is ManifestState.UNREADABLE
    assert name(2) in broken.detail


# Pins


async def test_pins_come_and_go(store: Store) -> None:
    await publish(store, 1)
    assert await read_pins(store) == frozenset()
    await pin(store, name(1))
    await pin(store, name(1))
    assert await read_pins(store) == {name(1)}
    await store.delete_file(RECORD.format(name(1)))
    await unpin(store, name(1))  # also one whose snapshot is gone
    assert await read_pins(store) == frozenset()
    with pytest.raises(StoreError, match="no such pin"):
        await unpin(store, name(1))
    with pytest.raises(StoreError, match="no such snapshot"):
        await pin(store, name(1))
    assert await read_pins(store) == frozenset()


async def test_a_pin_is_not_promised_while_snapshots_are_removed(file_store: Store) -> None:
    await publish(file_store, 1)
    async with every_lease(file_store, [SERVICE]):
        with pytest.raises(LeaseLostError, match="pin it again"):
            await pin(file_store, name(1))
    async with publisher_lease(file_store, SERVICE, "run-000002"):  # a cycle is no reason
        await pin(file_store, name(1))


async def test_a_removal_that_died_does_not_stop_pins_for_ever(file_store: Store) -> None:
    await publish(file_store, 1)
    log: LeaseLog = lease_log(file_store, SERVICE)
    async with publisher_lease(file_store, SERVICE, RETENTION) as lease:
        past = datetime.now(UTC) - timedelta(hours=1)
        await file_store.put_bytes(lease.renewed(past, 60).render(), log.path(lease.token))
        await pin(file_store, name(1))
    assert await read_pins(file_store) == {name(1)}


# Old cycles


async def test_old_reports_and_rollouts_go_and_unended_cycles_stay(store: Store) -> None:
    for version in (1, 2, 4):
        for path in ("reports/{}.json", "reports/{}.html", "metrics/{}.jsonl"):
            await store.put_bytes(b"report", "_hotload/" + path.format(f"run-{version:06d}"))
    await store.put_bytes(b"record", "_hotload/publications/run-000001.json")
    rollouts = "_hotload/rollouts"
    stays = [
        f"{rollouts}/{name(1)}/000003/manifest.json",  # version 3 sampled 1 and has not ended
        f"{rollouts}/{name(0)}/manifest.json",  # neither has 0
        f"{rollouts}/{name(4)}/manifest.json",
        f"{rollouts}/{name(1, 'other')}/manifest.json",
        "_hotload/ranks/run-000003/0000.json",
    ]
    goes = [
        f"{rollouts}/{name(1)}/{file}"
        for file in ("manifest.json", "part-00000-00.parquet", "claims/part/00000.json")
    ] + [f"{rollouts}/{name(1)}/000002/manifest.json", "_hotload/ranks/run-000001/0000/a.json"]
    for path in (*stays, *goes):
        await store.put_bytes(b"12345", path)
    first, second = await read_old_cycles(store, 1)
    assert (first.name, second.name) == ("run-000001", "run-000002")
    assert first.paths[0] == f"{rollouts}/{name(1)}/manifest.json"
    assert first.paths[-1] == "_hotload/reports/run-000001.json"
    assert first.size_bytes == 4 * 5 + 4 * 6
    looks: list[int] = []

    async def check() -> None:
        looks.append(len(await store.objects("_hotload")))

    await remove_cycles(store, [first, second], check)
    assert looks[0] > looks[1]  # before each
    left = {one.path for one in await store.objects("_hotload")}
    assert left == {
        *stays,
        "_hotload/reports/run-000004.json",
        "_hotload/reports/run-000004.html",
        "_hotload/metrics/run-000004.jsonl",
    }
    assert await read_old_cycles(store, 1) == ()


async def test_superseded_cycles_go_with_what_they_sampled(store: Store) -> None:
    for ended in ("run-000002", "run-000006", "run-000007", "run-000003.1"):
        await store.put_bytes(b"report", f"_hotload/reports/{ended}.json")
    rollouts = "_hotload/rollouts"
    superseded = [f"{rollouts}/{name(6)}/{file}" for file in ("manifest.json", "000007/x.parquet")]
    stays = [
        f"{rollouts}/{name(2)}/manifest.json",
        f"{rollouts}/run-000003.1-00000000/manifest.json",
        f"{rollouts}/run-000003.1-00000000/000007.1/manifest.json",
    ]
    for path in (*superseded, *stays):
        await store.put_bytes(b"12345", path)
    found = await read_old_cycles(store, 9)
    assert {one.name: one.paths for one in found} == {
        "run-000006": (superseded[0], "_hotload/reports/run-000006.json"),
        "run-000007": (superseded[1], "_hotload/reports/run-000007.json"),
    }
    # What was not due goes with its own cycle, also below a snapshot of a line.
    for ended in ("run-000007.1", "run-000008.1"):
        await store.put_bytes(b"report", f"_hotload/reports/{ended}.json")
    last = {one.name: one.paths for one in await read_old_cycles(store, 1)}
    assert last["run-000007.1"] == (stays[2], "_hotload/reports/run-000007.1.json")
    assert last["run-000003.1"] == (stays[1], "_hotload/reports/run-000003.1.json")
    fewer = {one.name: one.paths for one in await read_old_cycles(store, 2)}
    assert fewer["run-000006"] == (superseded[0], "_hotload/reports/run-000006.json")


# Digests


def collected() -> tuple[list[int], Callable[[int], None]]:
    advanced: list[int] = []
    return advanced, advanced.append


async def test_what_is_stored_as_it_was_published_is_found_so(store: Store) -> None:
    sizes = (0, 7, PIECE_BYTES, PIECE_BYTES + 1)
    manifest = await publish(store, 1, sizes=sizes)
    advanced, advance = collected()
    assert await verify_snapshot(store, manifest, advance) == []
    assert sum(advanced) == manifest.size_bytes
    assert max(advanced) <= PIECE_BYTES


Damage = Callable[[Store, str], Awaitable[None]]


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        ("object_digest", lambda store, path: store.put_bytes(b"x" * 200, path)),
        ("object_size", lambda store, path: store.put_bytes(b"x" * 199, path)),
        ("missing_object", lambda store, path: store.delete_file(path)),
    ],
)
async def test_an_object_that_differs_is_named(store: Store, rule: str, damage: Damage) -> None:
    manifest = await publish(store, 1)
    path = f"{name(1)}/model-00000.safetensors"
    await damage(store, path)
    advanced, advance = collected()
    (finding,) = await verify_snapshot(store, manifest, advance)
    assert (finding.rule, finding.file, finding.severity) == (rule, path, "error")
    assert sum(advanced) == manifest.size_bytes


async def test_an_object_that_no_manifest_names_is_a_warning(file_store: Store) -> None:
    manifest = await publish(file_store, 1)
    await file_store.put_bytes(b"x", f"{name(1)}/left-behind.safetensors")
    (finding,) = await verify_snapshot(file_store, manifest, lambda _: None)
    assert (finding.rule, finding.severity) == ("stray_object", "warning")
