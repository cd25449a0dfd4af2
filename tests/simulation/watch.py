"""What must hold after every step, whatever happens to processes, store and service.

1. A replica's files are the bytes that its identity names, and it merged a delta on its own base.
2. A manifest names only what is in the store; neither it nor what it names is changed. What is
   removed goes by a process that holds the leases of all services, the manifest first, and nothing
   depends on it: no replica serves, loads or would replay it, or what follows it. A delta has less
   than three quarters of the bytes of its full, where bytes alone decide.
3. A signal goes out for a snapshot that is whole in the store, while the sender's last look at that
   service says that there are replicas, none knows it and, for a delta, all serve its previous one;
   after the mark for that service was written and, after that, its lease seen to be the sender's
   own. A delta whose signal an earlier process may have sent there is not sent there again before
   it has been served everywhere. Nothing of an old line goes out, unless a person rolls back.
4. What a cycle says a service serves was shown as served by every replica of it; as many services
   as are required serve; and where it says that it has sampled, every part that its rollouts name
   is stored.
5. A cycle ends in its time, done or with an error that says who must act (`World.run` looks).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotload.clients.store.records import LINES, PUBLICATIONS, SIGNALS, SNAPSHOTS
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest, rollout_directory
from hotload.identity import NamedVersion, SnapshotKind, read_cycle_name
from hotload.publish.lease import LEASES
from hotload.publish.publication import Publication, ServicePublication
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport
from tests.simulation.loop import Process

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet
    from tests.simulation.world import World

UNSEEN = "a full damaged in the store is loaded unseen"
"""A full carries no checksum that a replica could look at (docs/unknown.md). Its bytes, and those
of the deltas on it, are then not compared."""


WORTHWHILE = 0.75
"""Of the bytes of a full: from there on a delta is no saving (decision 0023)."""


@dataclass
class Knows:
    """What one process has seen last of one service."""

    replicas: list[dict[str, Any]] | None = None
    has_looked: bool = False
    """Since it last signalled."""
    marked: set[str] = field(default_factory=set)
    lease: dict[str, Any] | None = None
    lease_seen_at: float = 0.0
    is_lease_newer_than_mark: bool = False
    is_lease_newer_than_removal: bool = False
    """Seen since it last removed a manifest."""


class Watch:
    """Looks at everything that is stored, sent, shown and loaded; `violations` are sentences."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.violations: list[str] = []
        self.manifests: dict[str, SnapshotManifest] = {}
        self.damaged: set[str] = set()
        self.foreign: dict[str, dict[str, str]] = {}
        self._knows: defaultdict[tuple[Process, str], Knows] = defaultdict(Knows)
        self._first_mark: dict[tuple[str, str], tuple[Process, float]] = {}
        self._served: set[tuple[str, str]] = set()
        self._begun: dict[int, float] = {}
        self._spoilt: set[Any] = set()
        self._looked_at: dict[Any, tuple[int, str | None]] = {}

    def violated(self, what: str) -> None:
        """Record what does not hold."""
        self._world.note(f"VIOLATION {what}")
        self.violations.append(what)

    async def storing(self, process: Process | None, path: str, data: bytes) -> None:
        """Look at an object that is about to be written."""
        objects = self._world.bucket.memory
        if path.startswith(f"{SNAPSHOTS}/"):
            await self._manifest(SnapshotManifest.model_validate_json(data), path)
        elif path.startswith(f"{SIGNALS}/") and process is not None:
            service, _, file = path.removeprefix(f"{SIGNALS}/").rpartition("/")
            knows, identity = self._knows[process, service], file.removesuffix(".json")
            knows.marked.add(identity)
            self._first_mark.setdefault((service, identity), (process, _now()))
            knows.is_lease_newer_than_mark = False
        elif path.startswith(f"{LINES}/"):
            named = read_cycle_name(path.rpartition("/")[2].removesuffix(".json"))
            self._begun.setdefault(named.line if named else 0, _now())
        elif path.partition("/")[0] in self.manifests and path not in self.damaged:
            size = await objects.size(path)
            if size is not None and await objects.read_bytes(path, size) != data:
                self.violated(f"{path}, which a manifest names, was written with other bytes")

    async def _manifest(self, manifest: SnapshotManifest, path: str) -> None:
        identity = manifest.identity
        for file in (*manifest.shards, *manifest.side_files):
            if not await self._is_stored(identity, file.file, file.sha256):
                self.violated(f"the manifest of {identity} names {file.file}, which is not stored")
        version = manifest.line, manifest.policy_version
        written = self._world.trainer.digests.get(version, {})
        named = {shard.file: shard.content_sha256 for shard in manifest.shards}
        if any(digest not in written.get(file, ()) for file, digest in named.items()):
            self.violated(f"the manifest of {identity} names other bytes than the trainer's")
        moved = sum(shard.size_bytes for shard in manifest.shards)
        is_delta = manifest.kind is SnapshotKind.DELTA and not self._world.is_time_priced
        if is_delta and moved >= WORTHWHILE * manifest.content_size_bytes:
            self.violated(f"the delta {identity} has {moved} bytes, and its full hardly more")
        before = self.manifests.setdefault(identity, manifest)
        dated = before.model_copy(update={"created_at": manifest.created_at})
        if dated.model_copy(update={"reason": manifest.reason}) != manifest:
            self.violated(f"the manifest of {identity} was changed")

    async def _is_stored(self, identity: str, file: str, sha256: str) -> bool:
        path = f"{identity}/{file}"
        if path in self.damaged:
            return True
        size = await self._world.bucket.memory.size(path)
        if size is None:
            return False
        data = await self._world.bucket.memory.read_bytes(path, size)
        return hashlib.sha256(data).hexdigest() == sha256

    def deleting(self, process: Process | None, path: str) -> None:
        """Look at an object that is about to be removed."""
        identity = path.partition("/")[0]
        is_record = path.startswith((f"{SNAPSHOTS}/", f"{SIGNALS}/"))
        if is_record:
            identity = path.rpartition("/")[2].removesuffix(".json")
        if identity not in self.manifests or path in self.damaged:
            return
        for fleet in self._world.fleets:
            knows = self._knows[process, fleet.access.service] if process else Knows()
            if not self._has_lease(knows, process) or not knows.is_lease_newer_than_removal:
                self.violated(f"{path} was removed without a look at the lease of {fleet.name}")
        if identity in self.needed():
            self.violated(f"{path} was removed, and replicas depend on it")
        is_manifest = path.startswith(f"{SNAPSHOTS}/")
        if not is_manifest and self._world.stored_bytes(f"{SNAPSHOTS}/{identity}.json"):
            self.violated(f"{path} was removed before its manifest")
        if is_manifest and process:
            for fleet in self._world.fleets:
                self._knows[process, fleet.access.service].is_lease_newer_than_removal = False

    def needed(self) -> set[str]:
        """Identities that replicas serve, load or would replay, and all that those follow."""
        needed = set[str]()
        for fleet in self._world.fleets:
            needed |= {load.identity for load in fleet.service.ledger.chain()}
            for replica in fleet.replicas:
                needed |= {replica.current or "", replica.target}
        for identity in [*needed]:
            last = self.manifests.get(identity)
            while last is not None and last.previous not in (None, *needed):
                needed.add(str(last.previous))
                last = self.manifests.get(str(last.previous))
        return needed

    @staticmethod
    def _has_lease(knows: Knows, process: Process | None) -> bool:
        lease = knows.lease
        number = process.number if process else None
        return bool(lease and lease["process"]["pid"] == number and not lease["released"])

    def read(self, process: Process | None, path: str, data: bytes) -> None:
        """Note what a process learns of a lease."""
        if process is None or not path.startswith(f"{LEASES}/"):
            return
        knows = self._knows[process, path.removeprefix(f"{LEASES}/").rpartition("/")[0]]
        try:
            knows.lease = json.loads(data)
        except ValueError:
            knows.lease = None
        knows.lease_seen_at = _now()
        knows.is_lease_newer_than_mark = knows.is_lease_newer_than_removal = True

    def shown(self, process: Process | None, fleet: Fleet, status: int, answer: bytes) -> None:
        """Note what a process is shown of the replicas of a service."""
        if process is None or status != 200:
            return
        knows = self._knows[process, fleet.access.service]
        try:
            knows.replicas = json.loads(answer)["replicas"]
        except (ValueError, LookupError, TypeError):
            return
        knows.has_looked = True

    def sending(self, process: Process | None, fleet: Fleet, body: dict[str, Any]) -> None:
        """Look at a signal as it leaves its process."""
        if process is None:
            return
        identity, service = str(body["identity"]), fleet.access.service
        knows, manifest = self._knows[process, service], self.manifests.get(identity)
        if manifest is None:
            self.violated(f"{process.name} signals {identity}, which has no manifest")
            return
        begun = max((one for one, at in self._begun.items() if at < knows.lease_seen_at), default=0)
        if manifest.line < begun and not process.may_go_back:
            self.violated(f"{process.name} signals {identity} of an old line; {begun} has begun")
        shown = knows.replicas or []
        if not knows.has_looked:
            self.violated(f"{process.name} signals {identity} without a look at the replicas")
        knows.has_looked = False
        if not shown:
            self.violated(f"{process.name} signals {identity} to a service without replicas")
        for replica in shown:
            target = replica["loading_state"].get("target_snapshot_identity")
            if identity in (replica["current_snapshot_identity"], target):
                self.violated(f"{process.name} signals {identity}, which a replica knows already")
        metadata = body.get("incremental_snapshot_metadata", {})
        if metadata.get("previous_snapshot_identity") != manifest.previous:
            self.violated(f"{process.name} signals {identity} as what it is not")
        if manifest.kind is SnapshotKind.DELTA:
            bases = {replica["current_snapshot_identity"] for replica in shown}
            if bases != {manifest.previous}:
                self.violated(f"{process.name} signals {identity} to replicas on {bases}")
            marker, marked_at = self._first_mark.get((service, identity), (process, 0.0))
            is_in_doubt = marker is not process and marked_at < process.began_at
            if is_in_doubt and (service, identity) not in self._served:
                self.violated(f"{process.name} signals the delta {identity} of {marker.name}")
        if identity not in knows.marked:
            self.violated(f"{process.name} signals {identity} without a mark")
        if not self._has_lease(knows, process) or not knows.is_lease_newer_than_mark:
            self.violated(
                f"{process.name} signals {identity} and did not see that it has the lease"
            )

    def claiming(self, process: Process | None, path: str, data: bytes) -> None:
        """Look at a record of a publication that is about to be sent to the store."""
        if process is not None and path.startswith(f"{PUBLICATIONS}/"):
            self.claimed(process, Publication.parse(data, path=path).services)

    def claimed(self, process: Process, services: Sequence[ServicePublication]) -> None:
        """Look at what a process says that the services serve."""
        served = {one.service: one.snapshot.identity for one in services if one.snapshot}
        needed = self._world.services_needed
        if len(served) < needed:
            self.violated(f"{process.name} is content with {[*served]}, and needs {needed}")
        for service, identity in served.items():
            shown = self._knows[process, service].replicas or []
            on = [one["current_snapshot_identity"] for one in shown if one["readiness"]]
            is_served = bool(shown) and on == [identity] * len(shown)
            was_served = (service, identity) in self._served and self._is_passed(identity, shown)
            if not is_served and not was_served:
                said = f"{process.name} says that {service} serves {identity}"
                self.violated(f"{said}, and was shown {shown}")
            self._served.add((service, identity))

    def _is_passed(self, identity: str, shown: Sequence[Any]) -> bool:
        """Whether all replicas are on it or have gone on to what the run has published later."""

        def place(one: str | None) -> tuple[int, int]:
            manifest = self.manifests.get(str(one))
            return (manifest.line, manifest.policy_version) if manifest else (-1, -1)

        reached = [
            max(
                place(replica["current_snapshot_identity"]),
                place(replica["loading_state"].get("target_snapshot_identity")),
            )
            for replica in shown
        ]
        return bool(reached) and min(reached) >= place(identity)

    def handed_back(self, report: CycleReport) -> None:
        """Look at the rollouts of a cycle that has ended."""
        version = NamedVersion(report.run_id, report.line, report.policy_version)
        directory = rollout_directory(report.rollouts.identity, version)
        data = self._world.stored_bytes(f"{directory}/{MANIFEST_FILE}")
        if data is None:
            self.violated(f"{report.name} has ended without rollouts")
            return
        rollouts = RolloutManifest.parse(data, path=directory)
        if not rollouts.is_complete:
            self.violated(f"{report.name} has ended, and its rollouts are not complete")
        for part in rollouts.parts:
            stored = self._world.stored_bytes(f"{directory}/{part.file}") or b""
            if hashlib.sha256(stored).hexdigest() != part.sha256:
                self.violated(f"{report.name} names {part.file}, which is not stored like that")

    def after_pass(self) -> None:
        """Look at every replica that has loaded something since."""
        for replica in self._world.replicas():
            count, held = self._looked_at.get(replica, (0, None))
            if len(replica.applications) == count:
                continue
            for entry in replica.applications[count:]:
                if entry["result"] == "error":
                    continue
                identity = entry["identity"]
                manifest = self.manifests.get(identity)
                if entry["kind"] == "delta":
                    if manifest and held != manifest.previous:
                        self.violated(f"{replica.name} merged {identity} on {held}")
                else:
                    self._spoilt.discard(replica)
                    if any(path.startswith(f"{identity}/") for path in self.damaged):
                        self._spoilt.add(replica)
                        self._world.strike(UNSEEN)
                held = identity
            self._looked_at[replica] = len(replica.applications), held
            self.look_at(replica)

    def look_at(self, replica: Any) -> None:
        """Compare the files that a replica serves from with what its identity names."""
        identity, directory = replica.current, replica._held
        if identity is None or directory is None or replica._is_torn or not directory.is_dir():
            return
        if directory.name != identity or replica in self._spoilt:
            return  # kept, and not served before the swap
        truth = self.truth(identity)
        if truth is None:
            self.violated(f"{replica.name} serves {identity}, which nobody wrote")
            return
        for path in sorted(directory.iterdir()):
            if hashlib.sha256(path.read_bytes()).hexdigest() != truth.get(path.name):
                self.violated(f"{replica.name} serves {identity} with other bytes in {path.name}")

    def truth(self, identity: str) -> dict[str, str] | None:
        """Digests of the files that an identity stands for; a manifest's were held to the trainer's
        own when it was written."""
        if (manifest := self.manifests.get(identity)) is None:
            return self.foreign.get(identity)
        digests = {shard.file: shard.content_sha256 for shard in manifest.shards}
        return digests | {side_file.file: side_file.sha256 for side_file in manifest.side_files}


def _now() -> float:
    return asyncio.get_running_loop().time()
