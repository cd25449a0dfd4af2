"""Publication: what becomes of a cycle's services, and the records of what was published.

Without the cycle's own record, one that was killed while it sampled beside later publications would
be refused when it starts again: the service may serve a later version by then.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.clients.service.served import sampled_service
from hotload.clients.store import Store
from hotload.clients.store.records import (
    read_lines,
    read_published,
    read_snapshot_manifest,
    write_publication,
)
from hotload.errors import HotLoadError, InvalidIdentityError, ServicesFailedError
from hotload.identity import check_identity, cycle_name
from hotload.publish.publication import (
    Publication,
    ServicePublication,
    may_sample,
    services_needed,
)
from hotload.publish.readiness import Standing
from hotload.publish.snapshot import CheckpointContent, SnapshotManifest
from hotload.report.earlier_run import EarlierRun
from hotload.sampling.rollout import SampledService
from hotload.spec import CycleSpec
from tasks import RETRIED
from tasks.show import emit_service_failure


class OngoingPublication:
    """What has become so far of a cycle's services, while it publishes to them side by side.

    Args:
        services: names of all, in the order of the spec.
        sampled: names of those that are sampled.
    """

    def __init__(
        self, spec: CycleSpec, services: Collection[str], sampled: Collection[str]
    ) -> None:
        self._spec, self._services = spec, tuple(services)
        self._sampled = tuple(name for name in services if name in sampled)
        self._needed = services_needed(spec.required, len(self._services))
        self._ended: dict[str, ServicePublication] = {}
        self._may_sample = asyncio.Event()

    @classmethod
    def of(
        cls,
        spec: CycleSpec,
        services: Collection[HotLoadClient],
        clients: Collection[InferenceClient],
    ) -> "OngoingPublication":
        """Begin with nothing done; each of the `clients` samples one of the services.

        Raises:
            ServiceRefusedError: one samples none of several.
        """
        names = [service.access.service for service in services]
        return cls(spec, names, {sampled_service(services, one.access) for one in clients})

    async def settle(
        self, service: HotLoadClient, publish: Callable[[], Awaitable[ServicePublication]]
    ) -> None:
        """Publish to one service and note what becomes of it; its error ends none of the others.

        Raises:
            HotLoadError: it failed, and there is no other.
        """
        try:
            ended = await publish()
        except HotLoadError as error:
            if not service.is_one_of_several:
                raise
            reason = f"{type(error).__name__}: {error}"
            get_run_logger().error("%s%s", service.said, reason)
            emit_service_failure(self._spec, service, reason)
            ended = ServicePublication(service=service.access.service, failure=reason)
        self._note(ended)

    def find(self, earlier: EarlierRun) -> Publication | None:
        """Take what an earlier run of the cycle recorded as published, if it stands everywhere; to
        sample it anew, it has to be served."""
        if self._spec.again and earlier.standing is not Standing.SERVED:
            return None
        found = [one for name in self._services if (one := earlier.found(name))]
        if earlier.publication is None or len(found) < len(self._services):
            return None
        for one in found:
            self._note(one)
        return self.publication(earlier.publication.content)

    async def sampled(self) -> tuple[ServicePublication, ...]:
        """Wait until sampling may begin; returns the services to sample that serve, in order."""
        await self._may_sample.wait()
        ended = [self._ended[name] for name in self._sampled]
        return tuple(one for one in ended if one.snapshot is not None)

    def publication(self, content: CheckpointContent) -> Publication:
        """Make the record of the publication, once all services have ended.

        Raises:
            ServicesFailedError: too few serve, or none of those that are sampled.
        """
        ended = tuple(self._ended[name] for name in self._services)
        if not may_sample(self._ended, needed=self._needed, sampled=self._sampled):
            expected = (
                f"{self._needed} of {len(ended)} services to serve it, and one that is sampled"
            )
            failures = "; ".join(f"{one.service}: {one.failure}" for one in ended if one.failure)
            raise ServicesFailedError(self._spec.name, expected, failures)
        first = next(self._ended[one] for one in self._sampled if self._ended[one].snapshot)
        assert first.snapshot is not None
        return Publication(
            content=content, snapshot=first.snapshot, fallback=first.fallback, services=ended
        )

    def _note(self, ended: ServicePublication) -> None:
        self._ended[ended.service] = ended
        if may_sample(self._ended, needed=self._needed, sampled=self._sampled):
            self._may_sample.set()


def sources_of(
    spec: CycleSpec,
    served: Sequence[ServicePublication],
    clients: Mapping[str, InferenceClient],
    services: Collection[HotLoadClient],
) -> list[SampledService]:
    """List what is sampled from, in the order of `served`: the share of a service that does not
    serve goes to the others."""
    by_name = {service.access.service: service for service in services}
    sampled = {block: sampled_service(services, one.access) for block, one in clients.items()}
    return [
        SampledService(
            client,
            one.snapshot.identity,
            one.snapshot.replica_count,
            spec.sampled_with[block],
            by_name[one.service] if spec.sampling.may_overlap else None,
            block,
        )
        for one in served
        for block, client in clients.items()
        if one.snapshot is not None and sampled[block] == one.service
    ]


@task(cache_policy=NO_CACHE, task_run_name="manifest-{identity}", **RETRIED)
async def find_manifest(store: Store, identity: str) -> SnapshotManifest | None:
    """Read a manifest as `read_snapshot_manifest` does, again while the store does not answer."""
    return await read_snapshot_manifest(store, identity)


@task(cache_policy=NO_CACHE, task_run_name="snapshot-{name}", **RETRIED)
async def find_snapshot(store: Store, run_id: str, name: str) -> SnapshotManifest:
    """Find a stored snapshot by its identity, or by the version of `run_id`: the last of it, in
    the newest line that has come to this version.

    Raises:
        InvalidIdentityError: the store has none of that name.
    """
    if name.isdecimal():
        line = (await read_lines(store, run_id)).line_at(int(name))
        published = await read_published(store, cycle_name(run_id, int(name), line))
        manifest = published[-1] if published else None
    else:
        manifest = await read_snapshot_manifest(store, check_identity(name))
    if manifest is None:
        known = f"{store.url} has no snapshot of it"
        raise InvalidIdentityError(name, f"{known}; versions of {run_id} lie there by number")
    return manifest


@task(cache_policy=NO_CACHE, task_run_name="published-{name}", **RETRIED)
async def record_publication(store: Store, name: str, publication: Publication) -> None:
    """Record that the replicas serve what cycle `name` published. Written under its lease.

    Raises:
        StoreError: the store refuses.
    """
    await write_publication(store, name, publication)
