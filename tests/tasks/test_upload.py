"""Uploading: what is whole becomes visible, in its order, once; a changed checkpoint is refused."""

import json
from typing import Any

import pytest

from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.directory.file_digests import FileDigests
from hotload.errors import (
    BaselineLostError,
    InvalidCheckpointError,
    StoreError,
    StoreUnavailableError,
)
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import Shard, ShardBatch, SnapshotManifest, SnapshotPlan
from tasks.baseline import Baseline
from tasks.plan import plan_snapshot
from tasks.upload import upload_manifests, upload_once, upload_shards
from tests.scripted_server import ScriptedServer, http
from tests.tasks.publishing import Publisher, disk_full_after, flip_a_byte, stamps


def shards_of(publisher: Publisher) -> tuple[Shard, ...]:
    return ShardBatch.as_written(publisher.content(1).shards).shards


async def upload(
    publisher: Publisher,
    plan: SnapshotPlan,
    shards: tuple[Shard, ...],
    digests: FileDigests | None = None,
) -> None:
    view, batch = publisher.view(1), ShardBatch(shards=shards)
    known = digests or FileDigests()
    await upload_shards.fn(publisher.store, plan.identity, view, batch, known)


async def finish(publisher: Publisher, plan: SnapshotPlan) -> SnapshotManifest:
    view, content = publisher.view(1), publisher.content(1)
    shards = shards_of(publisher)
    return await upload_manifests.fn(publisher.store, view, plan, content, shards, FileDigests())


async def test_shards_then_the_files_beside_them_then_our_manifest(publisher: Publisher) -> None:
    plan, shards = await publisher.plan(1), shards_of(publisher)
    await upload(publisher, plan, shards)
    stored = publisher.fleet.bucket / plan.identity
    assert {path.name for path in stored.iterdir()} == {shard.file for shard in shards}
    assert await read_snapshot_manifest(publisher.store, plan.identity) is None

    manifest = await finish(publisher, plan)
    assert await read_snapshot_manifest(publisher.store, plan.identity) == manifest
    checkpoint = publisher.fleet.checkpoints[1]
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    record = publisher.fleet.bucket / "_hotload" / "snapshots" / f"{plan.identity}.json"
    in_order = sorted((record, *stored.iterdir()), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in in_order[-4:]] == [
        CONFIG_FILE, SPEC_FILE, INDEX_FILE, record.name,
    ]  # fmt: skip
    assert {path.name for path in in_order[: len(shards)]} == {shard.file for shard in shards}


@pytest.mark.parametrize("knows", [False, True], ids=["unread", "read before"])
async def test_a_shard_changed_since_validation_is_never_announced(
    publisher: Publisher, knows: bool
) -> None:
    checkpoint = publisher.checkpoint_of_its_own(1)
    plan, shards = await publisher.plan(1), shards_of(publisher)
    digests = FileDigests()
    if knows:
        assert [digests.of(checkpoint / one.file) for one in shards] == [s.sha256 for s in shards]
    flip_a_byte(checkpoint / shards[2].file)
    with pytest.raises(InvalidCheckpointError, match="changed_while_read") as caught:
        await upload(publisher, plan, shards, digests)
    assert caught.value.findings[0].file == shards[2].file
    assert await read_snapshot_manifest(publisher.store, plan.identity) is None
    assert await publisher.store.size(f"{plan.identity}/{INDEX_FILE}") is None
    flip_a_byte(checkpoint / shards[2].file)
    await upload(publisher, plan, shards)
    stored = publisher.fleet.bucket / plan.identity / shards[2].file
    assert stored.read_bytes() == (checkpoint / shards[2].file).read_bytes()


async def test_a_config_saved_in_other_words_goes_out_as_it_is_served(
    publisher: Publisher,
) -> None:
    """A library that writes another version into config.json costs no full snapshot."""
    first = await publisher.publish(1)
    path = publisher.checkpoint_of_its_own(2) / CONFIG_FILE
    config = json.loads(path.read_bytes()) | {"transformers_version": "5.1", "pad_token_id": None}
    path.write_text(json.dumps(config))
    second = await publisher.publish(2)
    assert second.kind is SnapshotKind.DELTA
    assert second.side_files == first.side_files
    served = publisher.fleet.checkpoints[1] / CONFIG_FILE
    stored = publisher.fleet.bucket / second.identity / CONFIG_FILE
    assert stored.read_bytes() == served.read_bytes() != path.read_bytes()
    # The next one follows, and so does the baseline that a lost disk is rebuilt to.
    third = await publisher.elsewhere(publisher.work / "new").publish(3)
    assert (third.kind, third.side_files) == (SnapshotKind.DELTA, first.side_files)


async def test_a_served_file_that_the_store_lost_needs_a_full(publisher: Publisher) -> None:
    first = await publisher.publish(1)
    path = publisher.checkpoint_of_its_own(2) / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"_name_or_path": "step-1"}))
    plan = await publisher.plan(2)
    (publisher.fleet.bucket / first.identity / CONFIG_FILE).unlink()
    with pytest.raises(BaselineLostError, match=CONFIG_FILE):
        await publisher.carry(2, plan)


@pytest.mark.parametrize("file", [CONFIG_FILE, "tokenizer.json", INDEX_FILE])
@pytest.mark.parametrize("harm", ["changed", "gone"])
async def test_a_side_file_changed_since_validation_is_never_announced(
    publisher: Publisher, file: str, harm: str
) -> None:
    checkpoint = publisher.checkpoint_of_its_own(1)
    plan, content, shards = await publisher.plan(1), publisher.content(1), shards_of(publisher)
    view = publisher.view(1)
    await upload(publisher, plan, shards)
    if harm == "changed":
        flip_a_byte(checkpoint / file, 1)
    else:
        (checkpoint / file).unlink()
    with pytest.raises((InvalidCheckpointError, StoreError), match=file):
        await upload_manifests.fn(publisher.store, view, plan, content, shards, FileDigests())
    assert await read_snapshot_manifest(publisher.store, plan.identity) is None
    assert publisher.fleet.log()["signals"] == []


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("harm", ["nothing", "gone", "cut"])
async def test_what_the_store_lost_is_uploaded_again(publisher: Publisher, harm: str) -> None:
    plan, shards = await publisher.plan(1), shards_of(publisher)
    checkpoint, view = publisher.fleet.checkpoints[1], publisher.view(1)

    async def upload_cached() -> None:
        batch, results = ShardBatch(shards=shards), publisher.workspace.results
        await upload_once(publisher.store, plan.identity, view, batch, results, FileDigests())

    await upload_cached()
    stored = publisher.fleet.bucket / plan.identity / shards[4].file
    if harm == "gone":
        stored.unlink()
    elif harm == "cut":
        stored.write_bytes(stored.read_bytes()[:-1])
    before = stamps(stored.parent)
    await upload_cached()
    assert stored.read_bytes() == (checkpoint / shards[4].file).read_bytes()
    assert (stamps(stored.parent) == before) == (harm == "nothing")


@pytest.mark.usefixtures("prefect_api")
async def test_what_s3_lost_is_uploaded_again(s3_publisher: Publisher) -> None:
    plan, shards = await s3_publisher.plan(1), shards_of(s3_publisher)
    view, lost = s3_publisher.view(1), f"{plan.identity}/{shards[4].file}"
    for _ in range(2):
        batch, results = ShardBatch(shards=shards), s3_publisher.workspace.results
        await upload_once(s3_publisher.store, plan.identity, view, batch, results, FileDigests())
        assert await s3_publisher.store.size(lost) == shards[4].size_bytes
        await s3_publisher.store.delete_file(lost)


async def refused_by(publisher: Publisher, store: Store) -> StoreError:
    """What planning and uploading say of a store that does not work; both stop, nothing retries."""
    plan, content = await publisher.plan(1), publisher.content(1)
    baseline = Baseline(publisher.workspace, store, publisher.fleet.checkpoints[1])
    lease: Any = None  # looked at where a line begins
    with pytest.raises(StoreError) as caught:
        await plan_snapshot.fn(publisher.spec(1), publisher.service, baseline, content, lease)
    directory, shards = publisher.fleet.checkpoints[1], shards_of(publisher)
    batch = ShardBatch(shards=shards)
    with pytest.raises(StoreError) as again:
        await upload_shards.fn(store, plan.identity, directory, batch, FileDigests())
    assert not isinstance(caught.value, StoreUnavailableError)
    assert not isinstance(again.value, StoreUnavailableError)
    return again.value


async def test_a_directory_that_does_not_exist_is_not_created(publisher: Publisher) -> None:
    missing = publisher.work / "missing"
    error = await refused_by(publisher, Store(url=missing.as_uri()))
    assert "does not exist; hotload never creates one" in str(error)
    assert not missing.exists()


async def test_a_bucket_that_does_not_exist_is_not_created(s3_publisher: Publisher) -> None:
    options = s3_publisher.store.options
    error = await refused_by(s3_publisher, Store(url="s3://no-such", options=options))
    assert "does not exist; hotload never creates one" in str(error)


async def test_a_bucket_that_refuses_stops_us(publisher: Publisher) -> None:
    async with ScriptedServer().running() as server:
        body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        server.replies = [http(body, 403, "application/xml")]
        options = {"endpoint_url": server.address}
        store = Store(url="s3://bucket", options=options)
        error = await refused_by(publisher, store)
    assert "permission denied" in str(error) or "403" in str(error)


async def test_a_store_without_room_shows_nothing_half(publisher: Publisher) -> None:
    plan, shards = await publisher.plan(1), shards_of(publisher)
    with pytest.raises(StoreError, match="File too large"), disk_full_after(50_000):
        await upload(publisher, plan, shards)
    stored = publisher.fleet.bucket / plan.identity
    whole = {shard.file: shard.size_bytes for shard in shards}
    visible = list(stored.iterdir()) if stored.exists() else []
    assert all(path.stat().st_size == whole[path.name] for path in visible)
    assert not list((publisher.fleet.bucket / "_hotload" / "partial").iterdir())
    await upload(publisher, plan, shards)
    assert (await finish(publisher, plan)).kind is SnapshotKind.FULL


async def test_a_local_file_that_vanished_is_named(publisher: Publisher) -> None:
    plan, shards = await publisher.plan(1), shards_of(publisher)
    nowhere, batch = publisher.work / "nowhere", ShardBatch(shards=shards)
    with pytest.raises(StoreError, match=shards[0].file):
        await upload_shards.fn(publisher.store, plan.identity, nowhere, batch, FileDigests())
