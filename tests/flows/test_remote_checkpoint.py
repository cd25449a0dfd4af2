"""Checkpoints that lie in a bucket, through whole cycles: nothing of them stays on this disk but
the baseline."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from blocks.checkpoint_store import CheckpointStore
from flows.cycle import checkpoint_to_rollout
from flows.watch import publish_new_versions
from hotload.clients.store import Store
from hotload.clients.store.local_directory import LocalDirectory
from hotload.directory.files import AnyFile
from hotload.directory.relayout import view_checkpoint
from hotload.errors import InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.spec import WatchSpec
from tests.flows.fleet import Fleet
from tests.flows.test_layouts import assert_served, in_files, model_in, write_checkpoint
from tests.servers import StoreServer

ROOT = Path(__file__).parents[2]


class TrainersBucket:
    """A prefix of a bucket that a trainer writes to, and a block that opens it."""

    def __init__(self, server: StoreServer) -> None:
        self.url = f"{server.url}/{uuid4().hex}"
        self.name = f"trainer-{uuid4().hex[:12]}"
        self.store = Store(self.url, server.options)

    async def save_block(self) -> None:
        options = dict(self.store.options)
        await CheckpointStore(url=self.url, options=options).save(self.name)

    async def put(self, directory: Path, version: int) -> dict[str, str]:
        """Write a checkpoint; what a cycle says of where it lies."""
        for path in sorted(directory.iterdir()):  # noqa: ASYNC240
            await self.store.put_file(path, f"{version:06d}/{path.name}")
        checkpoint = f"{self.url}/{version:06d}"
        return {"checkpoint": checkpoint, "checkpoint_store": self.name}


@pytest.fixture
async def trainers(prefect_api: str, s3_server: StoreServer) -> TrainersBucket:
    del prefect_api
    bucket = TrainersBucket(s3_server)
    await bucket.save_block()
    return bucket


async def test_a_full_and_deltas_are_published_from_a_bucket(
    fleet: Fleet, trainers: TrainersBucket
) -> None:
    kinds = []
    for version in (1, 2):
        place = await trainers.put(fleet.checkpoints[version], version)
        report = await checkpoint_to_rollout(fleet.spec(version, **place))
        kinds.append(report.snapshot.kind)
        assert_served(fleet, report, model_in(fleet.checkpoints[version]))
        # The same identity as from a disk: where it lies is no part of what it is.
        assert report.content_sha256 == view_sha256(fleet.checkpoints[version])
    assert kinds == [SnapshotKind.FULL, SnapshotKind.DELTA]
    work = fleet.root / "work" / "local" / "rollouts"
    assert [path.name for path in (work / "baseline").iterdir()] == [report.snapshot.identity]


def view_sha256(directory: Path) -> str:
    from hotload.directory.files import sha256_file
    from hotload.publish.snapshot import content_sha256

    view = view_checkpoint(directory)
    names = [one.file for one in (*view.checkpoint.shards, *view.checkpoint.side_files)]
    return content_sha256({name: sha256_file(view.file(name)) for name in names})


async def test_a_watcher_publishes_any_layout_from_a_bucket(
    fleet: Fleet, trainers: TrainersBucket
) -> None:
    for version in (1, 2):
        model = write_checkpoint(fleet, version, in_files(3))
        place = await trainers.put(fleet.root / f"trainer-{version}", version)
    cycle = fleet.declared(1, **place)
    lines = await publish_new_versions(
        WatchSpec.model_validate({"cycle": cycle, "still_seconds": 0})
    )
    assert lines == ["000001: Completed", "000002: Completed"]
    reports = fleet.reports()
    assert [one.snapshot.kind for one in reports] == [SnapshotKind.FULL, SnapshotKind.DELTA]
    assert_served(fleet, reports[-1], model)


async def test_a_shard_that_is_not_listed_yet_is_named(
    fleet: Fleet, trainers: TrainersBucket
) -> None:
    place = await trainers.put(fleet.checkpoints[1], 1)
    await trainers.store.delete_file("000001/model-00003-of-00009.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"model-00003.*missing_shard"):
        await checkpoint_to_rollout(fleet.spec(1, **place))
    assert fleet.log()["signals"] == []


async def test_a_shard_replaced_after_validation_is_never_signalled(
    fleet: Fleet, trainers: TrainersBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await trainers.put(fleet.checkpoints[1], 1)
    shard = "000001/model-00003-of-00009.safetensors"
    data = await trainers.store.read_bytes(shard, limit_bytes=1 << 30)
    put = LocalDirectory.put_file

    async def replace_then_put(directory: LocalDirectory, local: AnyFile, path: str) -> None:
        await trainers.store.put_bytes(data[:-1] + bytes([data[-1] ^ 1]), shard)
        await put(directory, local, path)

    monkeypatch.setattr(LocalDirectory, "put_file", replace_then_put)
    with pytest.raises(InvalidCheckpointError, match="changed_while_read"):
        await checkpoint_to_rollout(fleet.spec(1, **place))
    assert fleet.log()["signals"] == []


CYCLES = """
import asyncio, json, sys
from flows.cycle import checkpoint_to_rollout
from flows.watch import publish_new_versions
from hotload.spec import CycleSpec

async def main():
    for declared in json.load(open(sys.argv[1])):
        report = await checkpoint_to_rollout(CycleSpec.model_validate(declared))
        print(report.snapshot.kind.value, flush=True)

asyncio.run(main())
"""
# As root of a namespace of its own, which sees a small disk where the cycle keeps its files.
SMALL_DISK = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTED = 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && exec "$@"'


@pytest.mark.skipif(
    subprocess.run([*SMALL_DISK, "true"], capture_output=True).returncode != 0,
    reason="this user may not mount a disk of its own",
)
def test_a_disk_with_no_room_for_a_second_copy_is_enough(
    fleet: Fleet, trainers: TrainersBucket
) -> None:
    whole = sum(path.stat().st_size for path in fleet.checkpoints[1].iterdir())
    work = fleet.root / "work"
    work.mkdir()
    cycles = []
    for version in (1, 2, 3):
        place = asyncio.run(trainers.put(fleet.checkpoints[version], version))
        cycles.append(fleet.declared(version, **place))
    (fleet.root / "cycles.json").write_text(json.dumps(cycles))
    mounted = ["sh", "-c", MOUNTED, "sh", str(whole * 14 // 10), str(work)]
    run = [sys.executable, "-c", CYCLES, str(fleet.root / "cycles.json")]
    ended = subprocess.run(
        [*SMALL_DISK, *mounted, *run],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == ["full", "delta", "delta"], ended.stderr[-3000:]
    assert fleet.log()["client_bugs"] == []
