"""The publisher's tasks as plain functions, on a real store and real replicas."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store, publisher_lease
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import sha256_file
from hotload.directory.relayout import CheckpointView, view_checkpoint
from hotload.directory.shards import read_checkpoint
from hotload.identity import SnapshotKind
from hotload.options import ReadinessPolicy
from hotload.publish.snapshot import (
    CheckpointContent,
    Shard,
    ShardBatch,
    SnapshotManifest,
    SnapshotPlan,
    batches,
)
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from hotload.spec import CycleSpec
from tasks.announce import signal_snapshot
from tasks.baseline import Baseline, keep_baseline
from tasks.encode import DeltaEncoder, encode_shards
from tasks.plan import plan_snapshot
from tasks.upload import upload_manifests, upload_shards
from tasks.wait import wait_until_ready
from tests.flows.fleet import API_KEY, NAMES, REPLICAS, SERVICE, Fleet
from tests.waiting import PATIENCE_SECONDS

IMPATIENT = ReadinessPolicy(
    poll_interval_seconds=0.01, weight_sync_timeout=0.2, scale_up_timeout_seconds=0.2
)
# Where the wait is to end well, whatever else the machine does.
PATIENT = IMPATIENT.model_copy(
    update={"weight_sync_timeout": 60.0, "scale_up_timeout_seconds": 60.0}
)


@dataclass
class Publisher:
    """What one machine does for one fleet; `work` is where it keeps its own files."""

    fleet: Fleet
    store: Store
    work: Path

    @property
    def service(self) -> HotLoadClient:
        """The service as its own block would be loaded, new every time."""
        return HotLoadClient(Access(base_url=self.fleet.url, api_key=API_KEY, **NAMES))

    def spec(self, version: int, **changes: Any) -> CycleSpec:
        """The cycle of one policy version."""
        return self.fleet.spec(version, work_dir=str(self.work), **changes)

    @property
    def workspace(self) -> Workspace:
        """This machine's own files for the service."""
        return Workspace(self.work, NAMES["account_id"], NAMES["deployment_id"])

    def baseline(self, version: int) -> Baseline:
        """The baseline as a new process opens it for the cycle of one version."""
        return Baseline(self.workspace, self.store, self.fleet.checkpoints[version])

    def encoder(
        self, version: int, plan: SnapshotPlan, digests: FileDigests | None = None
    ) -> DeltaEncoder:
        """What encodes the deltas of a plan, and knows no digests or these."""
        return DeltaEncoder(self.workspace, self.view(version), plan, digests or FileDigests())

    def view(self, version: int) -> CheckpointView:
        """A checkpoint as it would be published."""
        return view_checkpoint(self.fleet.checkpoints[version])

    def elsewhere(self, work: Path) -> Publisher:
        """Another machine: it knows the store and the service only."""
        return replace(self, work=work)

    def checkpoint_of_its_own(self, version: int) -> Path:
        """A copy of a checkpoint that a test may change; from now on it is that of `version`."""
        copy = Path(shutil.copytree(self.fleet.checkpoints[version], self.work / f"own-{version}"))
        self.fleet.checkpoints[version] = copy
        return copy

    def in_other_words(self, version: int) -> Path:
        """The same with a config.json that means the same."""
        path = self.checkpoint_of_its_own(version) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
        return path.parent

    def content(self, version: int) -> CheckpointContent:
        """What validation says of a full checkpoint."""
        directory = self.fleet.checkpoints[version]
        checkpoint = read_checkpoint(directory)
        shards = tuple(
            FileDigest(
                file=one.file, size_bytes=one.size_bytes, sha256=sha256_file(directory / one.file)
            )
            for one in checkpoint.shards
        )
        return CheckpointContent(
            kind=SnapshotKind.FULL, shards=shards, side_files=checkpoint.side_files
        )

    async def plan(self, version: int) -> SnapshotPlan:
        """What is published next."""
        spec, content = self.spec(version), self.content(version)
        lease: Any = None  # looked at where a line begins
        return await plan_snapshot.fn(spec, self.service, self.baseline(version), content, lease)

    async def carry(self, version: int, plan: SnapshotPlan) -> SnapshotManifest:
        """Encode and upload everything; nothing is signalled."""
        content, view = self.content(version), self.view(version)
        shards: list[Shard] = []
        with self.encoder(version, plan) as encoder:
            for files in batches(content.shards, 25):
                batch, source = ShardBatch.as_written(files), view
                if plan.kind is SnapshotKind.DELTA:
                    batch, source = await encode_shards.fn(encoder, files), encoder.directory
                digests = encoder.digests
                await upload_shards.fn(self.store, plan.identity, source, batch, digests)
                shards += batch.shards
        return await upload_manifests.fn(
            self.store, view, plan, content, tuple(shards), encoder.digests
        )

    async def signal(self, manifest: SnapshotManifest) -> tuple[str, ...]:
        """Signal it as the holder of the lease."""
        async with publisher_lease(self.store, SERVICE, "test") as lease:
            return await signal_snapshot.fn(self.service, self.store, manifest, lease)

    def respond(self, operation: str, status: int, body: str | None = None, **more: Any) -> None:
        """Let the service answer an operation with this status, and `body` as HTML."""
        self.fleet.fault(fault="respond", operation=operation, status=status, body=body, **more)

    def struck(self) -> int:
        """How often the faults ordered so far have struck."""
        found = (
            httpx.get(f"{self.fleet.url}/emulator/faults", timeout=PATIENCE_SECONDS)
            .raise_for_status()
            .json()
        )
        return sum(fault["struck"] for fault in found["faults"])

    async def serve(self, version: int) -> SnapshotManifest:
        """Publish a version as the plan says, until every replica serves it."""
        spec = self.spec(version)
        manifest = await self.carry(version, await self.plan(version))
        await self.signal(manifest)
        await wait_until_ready.fn(self.service, manifest, spec.readiness, REPLICAS)
        return manifest

    async def publish(self, version: int) -> SnapshotManifest:
        """`serve`, and move the baseline on."""
        manifest = await self.serve(version)
        await keep_baseline.fn(self.baseline(version), manifest.identity)
        return manifest


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by name, hidden ones too."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """Changes for every file of a directory that is written again, even with the same bytes."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.iterdir()}


def flip_a_byte(path: Path, offset: int = -1) -> None:
    """Change one byte, by default the last: the file keeps its size."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


@contextmanager
def disk_full_after(size_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `size_bytes`: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
