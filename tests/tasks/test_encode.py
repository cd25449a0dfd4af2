"""Encoding deltas: right, cached, encoded again when the cache or the disk is not to be trusted."""

from pathlib import Path

import pytest

from hotload.directory.file_digests import FileDigests
from hotload.directory.files import AnyFile, sha256_file
from hotload.directory.shards import apply_file
from hotload.errors import InvalidCheckpointError
from hotload.publish.snapshot import ShardBatch, SnapshotPlan
from hotload.records import FileDigest
from tasks.encode import encode_once, encode_shards
from tests.tasks.publishing import Publisher, disk_full_after, flip_a_byte, stamps

Batch = tuple[FileDigest, ...]


async def planned(publisher: Publisher) -> tuple[SnapshotPlan, Batch]:
    """The plan of version 2, a delta, and the batch of all its shards."""
    await publisher.publish(1)
    return await publisher.plan(2), publisher.content(2).shards


async def encode(
    publisher: Publisher, plan: SnapshotPlan, batch: Batch, digests: FileDigests | None = None
) -> ShardBatch:
    with publisher.encoder(2, plan, digests) as encoder:
        return await encode_shards.fn(encoder, batch)


async def encode_cached(publisher: Publisher, plan: SnapshotPlan, batch: Batch) -> ShardBatch:
    with publisher.encoder(2, plan) as encoder:
        return await encode_once(encoder, batch)


async def test_every_delta_restores_its_shard(publisher: Publisher, tmp_path: Path) -> None:
    plan, batch = await planned(publisher)
    encoded = await encode(publisher, plan, batch)
    baseline = publisher.workspace.baseline(str(plan.previous))
    assert [shard.file for shard in encoded.shards] == [shard.file for shard in batch]
    for shard, content in zip(encoded.shards, batch, strict=True):
        delta = publisher.workspace.delta(plan.identity) / shard.file
        assert (delta.stat().st_size, sha256_file(delta)) == (shard.size_bytes, shard.sha256)
        restored = apply_file(baseline / shard.file, delta, tmp_path / "restored")
        assert restored == shard.content_sha256 == content.sha256
        assert shard.content_size_bytes == content.size_bytes
        assert shard.size_bytes < content.size_bytes


class ChangedWhileRead(FileDigests):
    """The trainer changes a file between two looks at it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def known(self, path: AnyFile) -> str | None:
        found = super().known(path)
        if found and path == self._path:
            flip_a_byte(self._path)
        return found


@pytest.mark.parametrize("when", ["before anything is known", "when all is known", "meanwhile"])
async def test_a_checkpoint_changed_since_validation_is_refused(
    publisher: Publisher, when: str
) -> None:
    checkpoint = publisher.checkpoint_of_its_own(2)
    plan, batch = await planned(publisher)
    harmed = checkpoint / batch[5].file
    digests = ChangedWhileRead(harmed) if when == "meanwhile" else FileDigests()
    if when != "before anything is known":
        assert [digests.of(checkpoint / one.file) for one in batch] == [s.sha256 for s in batch]
    if when != "meanwhile":
        flip_a_byte(harmed)
    with pytest.raises(InvalidCheckpointError, match="changed_while_read") as caught:
        await encode(publisher, plan, batch, digests)
    assert caught.value.findings[0].file == batch[5].file
    assert "as validated" in str(caught.value)
    flip_a_byte(checkpoint / batch[5].file)
    assert await encode(publisher, plan, batch)


async def test_a_checkpoint_removed_since_validation_is_refused(publisher: Publisher) -> None:
    checkpoint = publisher.checkpoint_of_its_own(2)
    plan, batch = await planned(publisher)
    (checkpoint / batch[5].file).unlink()
    with pytest.raises(InvalidCheckpointError, match="missing_file"):
        await encode(publisher, plan, batch)


async def test_a_full_disk_leaves_nothing_half_written(publisher: Publisher) -> None:
    plan, batch = await planned(publisher)
    directory = publisher.workspace.delta(plan.identity)
    with pytest.raises(OSError, match="File too large"), disk_full_after(4096):
        await encode(publisher, plan, batch)
    whole = stamps(directory)
    assert len(whole) < len(batch)
    assert not [name for name in whole if name.startswith(".")]
    encoded = await encode(publisher, plan, batch)
    assert [sha256_file(directory / one.file) for one in encoded.shards] == [
        one.sha256 for one in encoded.shards
    ]


@pytest.mark.usefixtures("prefect_api")
class TestCached:
    """The cached result is believed as far as its files bear it out."""

    async def test_once(self, publisher: Publisher) -> None:
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        written = (
            stamps(publisher.workspace.delta(plan.identity)),
            stamps(publisher.workspace.results),
        )
        assert await encode_cached(publisher, plan, batch) == first
        assert (
            stamps(publisher.workspace.delta(plan.identity)),
            stamps(publisher.workspace.results),
        ) == written

    @pytest.mark.parametrize("harm", ["gone", "changed"])
    async def test_a_delta_that_is_not_what_it_was_is_encoded_again(
        self, publisher: Publisher, harm: str
    ) -> None:
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        delta = publisher.workspace.delta(plan.identity) / batch[3].file
        if harm == "gone":
            delta.unlink()
        else:
            flip_a_byte(delta)
        again = await encode_cached(publisher, plan, batch)
        assert again.shards == first.shards
        assert sha256_file(delta) == first.shards[3].sha256

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.99], ids=["empty", "half", "nearly whole"])
    async def test_a_result_that_a_kill_cut_short_is_a_miss(
        self, publisher: Publisher, kept: float
    ) -> None:
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        [result] = publisher.workspace.results.iterdir()
        data = result.read_bytes()
        result.write_bytes(data[: int(kept * len(data))])
        written = stamps(publisher.workspace.delta(plan.identity))
        again = await encode_cached(publisher, plan, batch)
        assert again.shards == first.shards
        assert stamps(publisher.workspace.delta(plan.identity)) != written
        written = stamps(publisher.workspace.delta(plan.identity))
        assert await encode_cached(publisher, plan, batch) == again
        assert stamps(publisher.workspace.delta(plan.identity)) == written

    @pytest.mark.parametrize("garbage", [b"\x00\xff" * 40, b"{}", b"null", b'{"metadata": 3}'])
    async def test_a_result_that_is_something_else_is_a_miss(
        self, publisher: Publisher, garbage: bytes
    ) -> None:
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        [result] = publisher.workspace.results.iterdir()
        result.write_bytes(garbage)
        assert (await encode_cached(publisher, plan, batch)).shards == first.shards

    async def test_a_result_of_another_schema_is_a_miss(self, publisher: Publisher) -> None:
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        [result] = publisher.workspace.results.iterdir()
        result.write_bytes(result.read_bytes().replace(b"encode_seconds", b"seconds_of_encoding"))
        assert (await encode_cached(publisher, plan, batch)).shards == first.shards

    async def test_other_content_is_another_key(self, publisher: Publisher) -> None:
        checkpoint = publisher.checkpoint_of_its_own(2)
        plan, batch = await planned(publisher)
        first = await encode_cached(publisher, plan, batch)
        flip_a_byte(checkpoint / batch[3].file)
        again = await encode_cached(publisher, plan, publisher.content(2).shards)
        assert again.shards[3].content_sha256 != first.shards[3].content_sha256
