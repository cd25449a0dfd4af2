"""A version from several ranks: the same bytes whoever writes them, one commit, and refusals."""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hotload.clients.publish import ShardPublisher, map_copy, read_copy
from hotload.clients.publish.served_shard import ServedShard
from hotload.clients.store import Store
from hotload.clients.store.rank_records import open_attempt, read_committed
from hotload.clients.store.records import read_snapshot_manifest, write_manifest
from hotload.clients.store.retention import read_stored_snapshots
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import sha256_file
from hotload.directory.shards import open_shard, read_checkpoint
from hotload.errors import (
    IdentityConflictError,
    InvalidCheckpointError,
    InvalidIdentityError,
    StoreError,
)
from hotload.identity import SnapshotKind, ranks_identity
from hotload.publish.chain import plan_full
from hotload.publish.retention import ManifestState
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotManifest
from hotload.records import FileDigest
from tasks.upload import adopt_committed
from tests.factories import CREATED_AT, cycle_spec
from tests.servers import StoreServer

Arrays = dict[str, np.ndarray[Any, Any]]


def tensors_of(path: Path) -> Arrays:
    """The tensors of a shard, their bits as numpy has them."""
    with open_shard(path) as shard:
        data = path.read_bytes()[shard.header.data_start :]
        kinds = {"BF16": "<u2", "F32": "<f4"}
        return {
            one.name: np.frombuffer(data[one.start : one.end], kinds[one.dtype]).reshape(one.shape)
            for one in shard.header.tensors
        }


def content_of(checkpoint: Path) -> CheckpointContent:
    found = read_checkpoint(checkpoint)
    shards = (
        FileDigest(
            file=one.file, size_bytes=one.size_bytes, sha256=sha256_file(checkpoint / one.file)
        )
        for one in found.shards
    )
    return CheckpointContent(
        kind=SnapshotKind.FULL, shards=tuple(shards), side_files=found.side_files
    )


def served_in(store: Store, checkpoint: Path) -> SnapshotManifest:
    """A full snapshot of version 1 in the store, without its shards: no rank reads them."""
    content = content_of(checkpoint)
    plan = plan_full(content, "test", run_id="run", policy_version=1)
    shards = ShardBatch.as_written(content.shards).shards
    manifest = SnapshotManifest.of(plan, content, shards, created_at=CREATED_AT)

    async def put() -> None:
        for file in content.side_files:
            await store.put_file(checkpoint / file.file, f"{plan.identity}/{file.file}")
        await write_manifest(store, manifest)

    asyncio.run(put())
    return manifest


class Ranks:
    """The ranks of a trainer that share a store in which version 1 is served."""

    def __init__(self, root: Path, checkpoints: list[Path]) -> None:
        self.root, self.checkpoints = root, checkpoints
        (root / "bucket").mkdir(parents=True)
        self.store = Store((root / "bucket").as_uri())
        self.first = served_in(self.store, checkpoints[1])

    def publisher(self, rank: int = 0, of: int = 1, **changes: Any) -> ShardPublisher:
        version = changes.pop("version", 2)
        served = changes.pop("served", None) or read_copy(self.checkpoints[1])
        declared = {"previous": self.first.identity, **changes}
        return ShardPublisher(self.store, "run", version, rank, of, served, **declared)

    def write(self, of: int, version: int = 2, *, by_file: bool = False) -> str:
        """Publish a version by so many ranks; returns its identity."""
        checkpoint = self.checkpoints[version]
        with self.publisher(0, of) as first:
            for rank in range(1, of):
                with self.publisher(rank, of, attempt=first.attempt) as other:
                    self.put(other, checkpoint)
            for file in first.share:
                first.put(file, checkpoint / file if by_file else tensors_of(checkpoint / file))
            return first.commit()

    def put(self, publisher: ShardPublisher, checkpoint: Path) -> None:
        for file in publisher.share:
            publisher.put(file, tensors_of(checkpoint / file))
        publisher.flush()

    def files(self, identity: str) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in (self.root / "bucket" / identity).iterdir()
        }

    def manifest(self, identity: str) -> SnapshotManifest:
        found = asyncio.run(read_snapshot_manifest(self.store, identity))
        assert found is not None
        return found


@pytest.fixture
def ranks(tmp_path: Path, checkpoints: list[Path]) -> Ranks:
    return Ranks(tmp_path / "one", checkpoints)


def test_every_topology_writes_the_same_bytes(
    ranks: Ranks, tmp_path: Path, checkpoints: list[Path]
) -> None:
    identity = ranks.write(of=1)
    manifest = ranks.manifest(identity)
    assert manifest.content == content_of(checkpoints[2])
    assert manifest.content_sha256 == content_of(checkpoints[2]).sha256
    assert (manifest.previous, manifest.chain_length) == (ranks.first.identity, 1)
    for of, by_file in ((2, False), (3, True)):
        other = Ranks(tmp_path / f"{of}", checkpoints)
        assert other.write(of=of, by_file=by_file) == identity
        assert other.files(identity) == ranks.files(identity)
        again = other.manifest(identity)
        assert again.model_copy(update={"created_at": manifest.created_at}) == manifest


def test_nothing_is_published_before_the_commit_and_retention_finds_the_rest(ranks: Ranks) -> None:
    with ranks.publisher() as publisher:
        ranks.put(publisher, ranks.checkpoints[2])
        identity = publisher.identity
    assert asyncio.run(read_committed(ranks.store, "run-000002")) is None
    assert asyncio.run(read_snapshot_manifest(ranks.store, identity)) is None
    stored = asyncio.run(read_stored_snapshots(ranks.store))
    assert {one.identity: one.state for one in stored} == {
        identity: ManifestState.MISSING,
        ranks.first.identity: ManifestState.READ,
    }


def test_a_commit_names_every_shard_that_no_rank_has_put(ranks: Ranks) -> None:
    with ranks.publisher(0, 2) as first:
        ranks.put(first, ranks.checkpoints[2])
        with pytest.raises(InvalidCheckpointError, match="put by no rank") as caught:
            first.commit()
        with ranks.publisher(1, 2, attempt=first.attempt) as other:
            missing = other.share
            assert {one.file for one in caught.value.findings} == {*missing}
            ranks.put(other, ranks.checkpoints[2])
        (ranks.root / "bucket" / first.identity / missing[0]).unlink()
        with pytest.raises(InvalidCheckpointError, match="not wholly put"):
            first.commit()


def test_a_rank_that_is_started_again_goes_on(ranks: Ranks) -> None:
    with ranks.publisher(0, 2) as first:
        ranks.put(first, ranks.checkpoints[2])
        for _ in range(2):
            with ranks.publisher(1, 2, attempt=first.attempt) as other:
                ranks.put(other, ranks.checkpoints[2])
    with ranks.publisher(0, 2, attempt=first.attempt) as again:
        identity = again.commit()
        assert identity == again.commit() == first.identity


def test_another_training_of_the_version_is_another_attempt(ranks: Ranks) -> None:
    with ranks.publisher() as first:
        ranks.put(first, ranks.checkpoints[2])
    with (
        ranks.publisher(attempt=first.attempt) as resumed,
        pytest.raises(IdentityConflictError, match="handed over in attempt 0 with other"),
    ):
        ranks.put(resumed, ranks.checkpoints[3])
    with ranks.publisher() as second:
        assert second.attempt == first.attempt + 1
        ranks.put(second, ranks.checkpoints[3])
        identity = second.commit()
    assert identity not in (first.identity, ranks.first.identity)
    assert ranks.manifest(identity).content == content_of(ranks.checkpoints[3])


def test_what_was_committed_is_adopted_also_where_rank_0_died_right_after(ranks: Ranks) -> None:
    spec = cycle_spec(checkpoint="ranks", policy_version=2)
    with pytest.raises(InvalidCheckpointError, match="0 attempts, none committed"):
        asyncio.run(adopt_committed.fn(ranks.store, spec))
    identity = ranks.write(of=1)
    manifest = ranks.manifest(identity)
    record = ranks.root / "bucket/_hotload/snapshots" / f"{identity}.json"
    record.unlink()
    assert (
        asyncio.run(adopt_committed.fn(ranks.store, spec)) == ranks.manifest(identity) == manifest
    )
    record.unlink()
    (ranks.root / "bucket" / identity / manifest.shards[0].file).unlink()
    with pytest.raises(InvalidCheckpointError, match="missing_file"):
        asyncio.run(adopt_committed.fn(ranks.store, spec))
    assert not record.exists()


def test_a_number_of_an_attempt_is_handed_out_once(ranks: Ranks) -> None:
    async def open_many() -> list[int]:
        opened = (open_attempt(ranks.store, "run-000002", "base", 2) for _ in range(8))
        return await asyncio.gather(*opened)

    # Objects that a removed record left lie under what would have been the next identity.
    taken = ranks_identity("run-000002", previous="base", attempt=0)
    (ranks.root / "bucket" / taken).mkdir()
    (ranks.root / "bucket" / taken / "shard").touch()
    assert sorted(asyncio.run(open_many())) == [*range(1, 9)]


def test_of_two_rank_0s_one_commits(ranks: Ranks) -> None:
    with ranks.publisher() as first, ranks.publisher() as second:
        ranks.put(first, ranks.checkpoints[2])
        ranks.put(second, ranks.checkpoints[3])
        identity = second.commit()
        with pytest.raises(IdentityConflictError, match=f"committed as {identity}"):
            first.commit()
    assert asyncio.run(read_snapshot_manifest(ranks.store, first.identity)) is None


def test_what_a_cycle_published_with_other_content_is_not_committed(ranks: Ranks) -> None:
    with ranks.publisher(version=1) as publisher:
        ranks.put(publisher, ranks.checkpoints[2])
        with pytest.raises(IdentityConflictError, match="with other content"):
            publisher.commit()


def test_what_a_cycle_published_in_other_words_is_the_same_content(ranks: Ranks) -> None:
    content = content_of(ranks.checkpoints[2])
    (side_file, *others) = content.side_files
    written = side_file.model_copy(update={"sha256": "0" * 64})
    said = content.model_copy(update={"side_files": (written, *others)})
    plan = plan_full(said, "test", run_id="run", policy_version=2)
    shards = ShardBatch.as_written(content.shards).shards
    manifest = SnapshotManifest.of(plan, said, shards, created_at=CREATED_AT)
    restored = manifest.model_copy(update={"side_files": content.side_files})
    asyncio.run(write_manifest(ranks.store, restored))
    assert ranks.manifest(ranks.write(of=1)).content == content


def test_a_copy_follows_what_is_served(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    copies = [
        read_copy(ranks.checkpoints[1]),
        read_copy(ranks.checkpoints[1], directory=tmp_path / "own"),
    ]
    for version, served in enumerate(copies, start=2):
        with ranks.publisher(version=version, served=served) as publisher:
            ranks.put(publisher, ranks.checkpoints[3])  # never committed
        with ranks.publisher(version=version, served=served) as publisher:
            ranks.put(publisher, ranks.checkpoints[2])
            second = publisher.commit()
        with ranks.publisher(version=9 + version, served=served, previous=second) as publisher:
            ranks.put(publisher, ranks.checkpoints[4])
            manifest = ranks.manifest(publisher.commit())
            assert manifest.content == content_of(ranks.checkpoints[4])
    # Its files now hold version 2; a process that is started again catches up by the store.
    third = manifest.identity
    restarted = map_copy(tmp_path / "own")
    with ranks.publisher(version=20, served=restarted, previous=third) as publisher:
        ranks.put(publisher, ranks.checkpoints[5])
        assert ranks.manifest(publisher.commit()).content == content_of(ranks.checkpoints[5])
    for file in restarted:
        assert sha256_file(tmp_path / "own" / file) == sha256_file(ranks.checkpoints[4] / file)


def test_a_copy_of_something_else_is_refused(ranks: Ranks) -> None:
    wrong = read_copy(ranks.checkpoints[0])
    with ranks.publisher(served=wrong) as publisher:
        file = publisher.share[1]
        with pytest.raises(StoreError, match=f"{ranks.first.identity}/.*does not exist"):
            ranks.put(publisher, ranks.checkpoints[2])
        stored = ranks.root / "bucket" / ranks.first.identity / file
        shutil.copyfile(ranks.checkpoints[2] / file, stored)
        with pytest.raises(StoreError, match="not what was published"):
            publisher.put(file, ranks.checkpoints[2] / file)
        # Of another size it is no copy of this shard: there is no room for what is served.
        shutil.copyfile(ranks.checkpoints[1] / file, stored)
        sizes = {len(one._data): one._data for one in wrong.values()}
        del sizes[len(wrong[file]._data)]
        wrong[file] = ServedShard(file, min(sizes.values(), key=len))
        with pytest.raises(InvalidCheckpointError, match=r"served_copy.*as served: read"):
            publisher.put(file, ranks.checkpoints[2] / file)


class Watched(ServedShard):
    """A copy that notes which threads work on it."""

    threads: ClassVar[set[str]] = set()

    def follow(self, sha256: str, pool: Workers) -> None:
        self.threads.add(threading.current_thread().name)
        super().follow(sha256, pool)


@pytest.mark.parametrize("harm", ["a full since", "a full and a delta since", "torn by a kill"])
def test_a_copy_from_before_is_led_across_a_full_snapshot(
    ranks: Ranks, tmp_path: Path, harm: str
) -> None:
    (tmp_path / "own").mkdir()
    read_copy(ranks.checkpoints[1 if harm == "torn by a kill" else 0], directory=tmp_path / "own")
    for path in ranks.checkpoints[1].glob("*.safetensors"):
        shutil.copy(path, ranks.root / "bucket" / ranks.first.identity)
    previous = ranks.first.identity
    if harm != "a full since":
        previous = ranks.write(of=1)
    if harm == "torn by a kill":
        for path in (tmp_path / "own").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    copy = map_copy(tmp_path / "own")
    served = {file: Watched(file, one._data) for file, one in copy.items()}
    with ranks.publisher(version=3, served=served, previous=previous) as publisher:
        ranks.put(publisher, ranks.checkpoints[3])
        assert ranks.manifest(publisher.commit()).content == content_of(ranks.checkpoints[3])
    expected = ranks.checkpoints[1 if harm == "a full since" else 2]
    for file in served:
        assert sha256_file(tmp_path / "own" / file) == sha256_file(expected / file)
    assert Watched.threads == {threading.current_thread().name}  # not the one that serves uploads


def test_a_chain_without_an_end_is_refused(ranks: Ranks) -> None:
    second = ranks.manifest(ranks.write(of=1))
    first = ranks.first.model_copy(
        update={
            "kind": SnapshotKind.DELTA,
            "previous": second.identity,
            "anchor": second.identity,
            "chain_length": 1,
            "codec": "arc_v2",
            "checksum": "adler32",
        }
    )
    asyncio.run(write_manifest(ranks.store, first))
    wrong = read_copy(ranks.checkpoints[0])
    with (
        ranks.publisher(version=3, served=wrong, previous=second.identity) as publisher,
        pytest.raises(StoreError, match="does not end"),
    ):
        ranks.put(publisher, ranks.checkpoints[3])


def test_every_shard_that_is_not_in_the_store_is_told_until_it_is(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    with ranks.publisher() as other:
        blocked, conflict, good, *_ = other.share
        other.put(conflict, ranks.checkpoints[3] / conflict)
    place = ranks.root / "bucket" / other.identity / blocked
    place.mkdir()
    (place / "in the way").touch()
    with ranks.publisher(attempt=other.attempt) as publisher:
        for file in (blocked, conflict, good):
            publisher.put(file, ranks.checkpoints[2] / file)
        for _ in range(2):
            caplog.clear()
            with pytest.raises(IdentityConflictError, match=f"{conflict} was handed over"):
                publisher.flush()
            assert "failed as well: StoreError" in caplog.text
            assert blocked in caplog.text
        publisher.put(conflict, ranks.checkpoints[3] / conflict)
        with pytest.raises(StoreError, match=blocked):
            publisher.commit()
        (place / "in the way").unlink()
        place.rmdir()
        publisher.put(blocked, ranks.checkpoints[2] / blocked)
        publisher.flush()


class OnDevice:
    """A tensor that lies on another device, as DLPack says it."""

    dtype, shape = "torch.bfloat16", (1,)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def without(tensors: Arrays) -> Mapping[str, object]:
    return dict(list(tensors.items())[1:])


def changed(value: Callable[[Any], object]) -> Callable[[Arrays], Mapping[str, object]]:
    """All tensors, with another in the place of the last matrix."""

    def change(tensors: Arrays) -> Mapping[str, object]:
        name = [name for name, one in tensors.items() if one.ndim == 2][-1]
        return {**tensors, name: value(tensors[name])}

    return change


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (without, "missing_tensor"),
        (lambda tensors: {**tensors, "other.weight": np.zeros(1)}, "other.weight': extra_tensor"),
        (changed(lambda one: OnDevice()), "device.*on CUDA"),
        (changed(lambda one: one.T), "shape"),
        (changed(lambda one: np.asfortranarray(one)), "contiguous.*copy it first"),
        (changed(lambda one: one.astype("<f4")), "dtype.*F32.*BF16"),
        (changed(lambda one: one.astype(">u2")), "dtype.*>u2"),
        (changed(lambda one: "weights"), "buffer.*str"),
    ],
)
def test_tensors_that_are_not_those_served_are_refused_by_name(
    ranks: Ranks, tensors: Callable[[Arrays], Mapping[str, object]], found: str
) -> None:
    with ranks.publisher() as publisher:
        file = publisher.share[1]
        given = tensors(tensors_of(ranks.checkpoints[2] / file))
        with pytest.raises(InvalidCheckpointError, match=found):
            publisher.put(file, given)
        assert not (ranks.root / "bucket" / publisher.identity).exists()


def test_what_has_a_buffer_alone_will_do(ranks: Ranks) -> None:
    with ranks.publisher() as publisher:
        file = publisher.share[1]
        given = tensors_of(ranks.checkpoints[2] / file)
        shard = publisher.put(file, {name: memoryview(one) for name, one in given.items()})
        assert shard.content_sha256 == sha256_file(ranks.checkpoints[2] / file)


def test_a_shard_or_file_of_another_model_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    with ranks.publisher() as publisher:
        first, second, *_ = publisher.share
        with pytest.raises(InvalidCheckpointError, match="unknown_shard"):
            publisher.put("other.safetensors", {})
        with pytest.raises(InvalidCheckpointError, match=r"layout.*the tensors that are served"):
            publisher.put(first, ranks.checkpoints[2] / second)


def test_what_cannot_be_begun_is_refused(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="rank: expected 0 to 1, not 2"):
        ranks.publisher(2, 2)
    with pytest.raises(ValueError, match="attempt: expected the number that rank 0's"):
        ranks.publisher(1, 2)
    with pytest.raises(InvalidIdentityError, match="no earlier version of the run"):
        ranks.publisher(previous=None).__enter__()
    with pytest.raises(InvalidIdentityError, match="has no snapshot of it"):
        ranks.publisher(previous="run-000001-00000000").__enter__()
    with (
        ranks.publisher(0, 2) as first,
        pytest.raises(ValueError, match="of: expected 2, as rank 0 has it in attempt 0"),
    ):
        ranks.publisher(1, 3, attempt=first.attempt).__enter__()


def test_a_version_on_s3(s3_server: StoreServer, checkpoints: list[Path]) -> None:
    store = Store(f"{s3_server.url}/{uuid.uuid4().hex}", dict(s3_server.options))
    previous, served = served_in(store, checkpoints[1]).identity, read_copy(checkpoints[1])
    first = ShardPublisher(store, "run", 2, 0, 2, served, previous=previous)
    with first as zero, ShardPublisher(store, "run", 2, 1, 2, served, attempt=zero.attempt) as one:
        for publisher in (zero, one, zero):
            for file in publisher.share:
                publisher.put(file, checkpoints[2] / file)
            publisher.flush()
        identity = zero.commit()
    manifest = asyncio.run(read_snapshot_manifest(store, identity))
    assert manifest is not None
    assert manifest.content == content_of(checkpoints[2])
    with ShardPublisher(store, "run", 2, 0, 1, served, previous=previous) as late:
        for file in late.share:
            late.put(file, checkpoints[3] / file)
        with pytest.raises(IdentityConflictError, match=f"committed as {identity}"):
            late.commit()


def test_the_library_face_loads_no_engine() -> None:
    import subprocess
    import sys

    script = "import sys, hotload.clients.publish\nsys.exit('prefect' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
