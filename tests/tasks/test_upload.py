"""Uploading: what is whole becomes visible, in its order, once; a changed checkpoint is refused."""

import pytest

from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.errors import InvalidCheckpointError, StoreError, StoreUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import Shard, ShardBatch, SnapshotManifest, SnapshotPlan
from tasks.baseline import Baseline
from tasks.plan import plan_snapshot
from tasks.upload import upload_manifests, upload_once, upload_shards
from tests.scripted_server import ScriptedServer, http
from tests.tasks.publishing import Publisher, disk_full_after, flip_a_byte, stamps


def shards_of(publisher: Publisher) -> tuple[Shard, ...]:
    return ShardBatch.as_written(publisher.content(1).shards).shards


async def upload(publisher: Publisher, plan: SnapshotPlan, shards: tuple[Shard, ...]) -> None:
    directory = str(publisher.fleet.checkpoints[1])
    await upload_shards.fn(publisher.store, plan.identity, directory, ShardBatch(shards=shards))


async def finish(publisher: Publisher, plan: SnapshotPlan) -> SnapshotManifest:
    checkpoint, content = publisher.fleet.checkpoints[1], publisher.content(1)
    shards = shards_of(publisher)
    return await upload_manifests.fn(publisher.store, checkpoint, plan, content, shards)


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


async def test_a_shard_changed_since_validation_is_never_announced(publisher: Publisher) -> None:
    checkpoint = publisher.checkpoint_of_its_own(1)
    plan, shards = await publisher.plan(1), shards_of(publisher)
    flip_a_byte(checkpoint / shards[2].file)
    with pytest.raises(InvalidCheckpointError, match="changed_while_read") as caught:
        await upload(publisher, plan, shards)
    assert caught.value.findings[0].file == shards[2].file
    assert await read_snapshot_manifest(publisher.store, plan.identity) is None
    assert await publisher.store.size(f"{plan.identity}/{INDEX_FILE}") is None
    flip_a_byte(checkpoint / shards[2].file)
    await upload(publisher, plan, shards)
    stored = publisher.fleet.bucket / plan.identity / shards[2].file
    assert stored.read_bytes() == (checkpoint / shards[2].file).read_bytes()


@pytest.mark.parametrize("file", [CONFIG_FILE, "tokenizer.json", INDEX_FILE])
@pytest.mark.parametrize("harm", ["changed", "gone"])
async def test_a_side_file_changed_since_validation_is_never_announced(
    publisher: Publisher, file: str, harm: str
) -> None:
    checkpoint = publisher.checkpoint_of_its_own(1)
    plan, content, shards = await publisher.plan(1), publisher.content(1), shards_of(publisher)
    await upload(publisher, plan, shards)
    if harm == "changed":
        flip_a_byte(checkpoint / file, 1)
    else:
        (checkpoint / file).unlink()
    with pytest.raises((InvalidCheckpointError, StoreError), match=file):
        await upload_manifests.fn(publisher.store, checkpoint, plan, content, shards)
    assert await read_snapshot_manifest(publisher.store, plan.identity) is None
    assert publisher.fleet.log()["signals"] == []


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("harm", ["nothing", "gone", "cut"])
async def test_what_the_store_lost_is_uploaded_again(publisher: Publisher, harm: str) -> None:
    plan, shards = await publisher.plan(1), shards_of(publisher)
    checkpoint = publisher.fleet.checkpoints[1]

    async def upload_cached() -> None:
        batch, results = ShardBatch(shards=shards), publisher.workspace.results
        await upload_once(publisher.store, plan.identity, checkpoint, batch, results)

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
    checkpoint, lost = s3_publisher.fleet.checkpoints[1], f"{plan.identity}/{shards[4].file}"
    for _ in range(2):
        batch, results = ShardBatch(shards=shards), s3_publisher.workspace.results
        await upload_once(s3_publisher.store, plan.identity, checkpoint, batch, results)
        assert await s3_publisher.store.size(lost) == shards[4].size_bytes
        await s3_publisher.store.delete_file(lost)


async def refused_by(publisher: Publisher, store: Store) -> StoreError:
    """What planning and uploading say of a store that does not work; both stop, nothing retries."""
    plan, content = await publisher.plan(1), publisher.content(1)
    baseline = Baseline(publisher.workspace, store, publisher.fleet.checkpoints[1])
    with pytest.raises(StoreError) as caught:
        await plan_snapshot.fn(publisher.spec(1), publisher.service, baseline, content)
    directory, shards = str(publisher.fleet.checkpoints[1]), shards_of(publisher)
    with pytest.raises(StoreError) as again:
        await upload_shards.fn(store, plan.identity, directory, ShardBatch(shards=shards))
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
    nowhere, batch = str(publisher.work / "nowhere"), ShardBatch(shards=shards)
    with pytest.raises(StoreError, match=shards[0].file):
        await upload_shards.fn(publisher.store, plan.identity, nowhere, batch)
