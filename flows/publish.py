"""Publish: the policy to every replica by one snapshot, and by a full one when a delta failed.

To several services side by side, each by the snapshot that its own replicas can load; what two of
them load is encoded and uploaded once.
"""

from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from prefect import State, flow
from prefect.states import Completed

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.carry import carry_content, keep_baselines, read_on_nodes
from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.clients.service.served import sampled_service, side_by_side
from hotload.clients.store import Store, publisher_lease
from hotload.clock import monotonic, utc_now
from hotload.concurrently import overlap, taking_turns, turn
from hotload.errors import FullSnapshotFailedError, NeedsFullSnapshotError
from hotload.identity import SnapshotKind, is_identity
from hotload.options import LedgerReset
from hotload.publish.lease import Lease
from hotload.publish.publication import Publication, ServedSnapshot, ServicePublication
from hotload.publish.snapshot import (
    CheckpointContent,
    ShardBatch,
    SnapshotManifest,
    SnapshotPlan,
)
from hotload.publish.workspace import Workspace
from hotload.report.earlier_run import EarlierRun
from hotload.spec import CycleSpec
from tasks.announce import reset_ledger, signal_snapshot
from tasks.baseline import Baseline, baseline_of, with_checkpoint
from tasks.conclude import find_earlier
from tasks.plan import plan_fallback, plan_snapshot
from tasks.preflight import preflight_rollouts, preflight_service
from tasks.probe import probe_replicas, read_probe
from tasks.publication import OngoingPublication, find_manifest, record_publication
from tasks.show import emit_fallback, emit_served
from tasks.upload import adopt_committed, upload_manifests
from tasks.validate import (
    check_both,
    place_of,
    validate_checkpoint,
    validate_rollouts,
    view_of,
)
from tasks.wait import wait_for_replicas, wait_until_ready, wait_until_settled

FULLS_TRIED = 2


async def load_services(spec: CycleSpec) -> dict[str, HotLoadClient]:
    """Open the services of a cycle, by the names of their blocks.

    Raises:
        ServiceRefusedError: as `side_by_side`.
    """
    opened = {name: (await HotLoadService.load(name)).open() for name in spec.services}
    return side_by_side(opened, is_made_here=not (spec.placement or spec.is_of_ranks))


async def hold_services(
    right_to_publish: AsyncExitStack,
    services: Mapping[str, HotLoadClient],
    store: Store,
    holder: str,
) -> dict[str, Lease]:
    """Take the publisher's leases of all services, by their names; `right_to_publish` gives them
    back.

    Raises:
        LeaseLostError: another cycle publishes to one of them.
    """
    # In one order everywhere: of two cycles that want the same services, one gets them all.
    names = sorted(service.access.service for service in services.values())
    return {
        name: await right_to_publish.enter_async_context(publisher_lease(store, name, holder))
        for name in names
    }


async def publish_policy(
    spec: CycleSpec,
    services: Mapping[str, HotLoadClient],
    baseline: Baseline,
    earlier: EarlierRun,
    ongoing: OngoingPublication,
    right_to_publish: AsyncExitStack,
    clients: Collection[InferenceClient] = (),
) -> Publication:
    """Publish this policy version, or find what an earlier run of the cycle published.

    On-policy the right to publish stays held when this returns, so that no other cycle changes the
    weights that the caller samples. Where the spec lets the next cycle publish meanwhile, the right
    is given back, and the record of the publication lets a cycle that is killed go on sampling.

    Args:
        ongoing: what has become of each service; sampling begins by it, beside this.
        right_to_publish: holds the publisher's leases; its owner gives them back.
        clients: what is to be sampled with; none where nothing is, whatever is declared for it.

    Raises:
        LeaseLostError: another cycle publishes to one of the services.
        InvalidCheckpointError, InvalidProblemsError, RewardError, RolloutFunctionError: the
            caller's input, InvalidInputError for several of them; nothing was uploaded.
        ServiceRefusedError: the only service cannot be hot-loaded from this store, or would answer
            no sample.
        FullSnapshotFailedError, SnapshotRejectedError: as `full_snapshot`, of the only service.
        ServicesFailedError: too few of several services serve it.
    """
    if spec.sampling.may_overlap and (found := ongoing.find(earlier)):
        return found
    reading = find_content(spec, services, baseline, earlier)
    if clients:
        reading = check_both(reading, validate_rollouts(spec, baseline.store))
    content = await reading
    leases = await hold_services(right_to_publish, services, baseline.store, spec.name)
    publication = await publish_to_all(
        spec, services, baseline, content, leases, earlier, ongoing, clients
    )
    await keep_baselines(spec, baseline, content, publication.identities)
    if spec.sampling.may_overlap:
        await record_publication(baseline.store, spec.name, publication)
        await right_to_publish.aclose()
    return publication


@flow(name="publish-version", flow_run_name="publish-{spec.name}", persist_result=False)
async def publish_version(spec: CycleSpec) -> Publication | State[Publication]:
    """Publish a version that nothing is sampled from: the last one of a training run.

    Its state has a name of its own where it leaves no baseline.

    Raises:
        As `publish_policy`.
    """
    services = await load_services(spec)
    store = (await CheckpointStore.load(spec.store)).open()
    clients = {name: (await RolloutClient.load(name)).open() for name in spec.sampled_with}
    workspace = services[spec.service].access.workspace(Path(spec.work_dir))
    baseline = await baseline_of(spec, workspace, store)
    earlier = await find_earlier(store, services.values(), spec)
    ongoing = OngoingPublication.of(spec, services.values(), clients.values())
    async with AsyncExitStack() as right_to_publish:
        publication = await publish_policy(
            spec, services, baseline, earlier, ongoing, right_to_publish
        )
        await record_publication(store, spec.name, publication)
    if baseline.trouble is None:
        return publication
    message = publication.snapshot.without_baseline(baseline.trouble)
    return Completed(name="CompletedWithoutBaseline", message=message, data=publication)


async def find_content(
    spec: CycleSpec,
    services: Mapping[str, HotLoadClient],
    baseline: Baseline,
    earlier: EarlierRun,
) -> CheckpointContent:
    """Read what is to be published: the trainer's directory, validated, or what its ranks have
    committed, whose tensors are those of the snapshot that it follows.

    Where the shards are placed on nodes, those read their bytes, and foresee a delta on what is
    served now.

    Raises:
        InvalidCheckpointError: as `validate_checkpoint` and `adopt_committed`.
    """
    if spec.placement:
        served = [one.served_everywhere for one in earlier.statuses.values()]
        bases = sorted(filter(is_identity, set().union(*served)))
        read = partial(read_on_nodes, spec=spec, baseline=baseline, bases=bases)
        return await validate_checkpoint(spec, services.values(), baseline.digests, read)
    if not spec.is_of_ranks:
        return await validate_checkpoint(spec, services.values(), baseline.digests)
    committed = await adopt_committed(baseline.store, spec)
    baseline.take(committed)
    return committed.content


async def publish_to_all(
    spec: CycleSpec,
    services: Mapping[str, HotLoadClient],
    baseline: Baseline,
    content: CheckpointContent,
    leases: Mapping[str, Lease],
    earlier: EarlierRun,
    ongoing: OngoingPublication,
    clients: Collection[InferenceClient] = (),
    *,
    may_go_back: bool = False,
) -> Publication:
    """Publish to every service side by side; one that fails does not hold the others.

    Args:
        content: of the checkpoint that the spec names, validated.
        clients: what is to be sampled with; none where nothing is, whatever is declared for it.
        may_go_back: as `plan_next`.

    Raises:
        As `publish_to`, of the only service; ServicesFailedError: too few of several serve it.
    """
    baseline.reserved = {name: one.mentioned for name, one in earlier.statuses.items()}
    with taking_turns():
        await overlap(
            ongoing.settle(
                service,
                partial(
                    publish_to,
                    spec.at(block),
                    service,
                    baseline,
                    content,
                    leases[service.access.service],
                    earlier,
                    asked_by(clients, service, services),
                    may_go_back=may_go_back,
                ),
            )
            for block, service in services.items()
        )
    return ongoing.publication(content)


async def publish_to(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    lease: Lease,
    earlier: EarlierRun,
    clients: Collection[InferenceClient],
    *,
    may_go_back: bool,
) -> ServicePublication:
    """Publish to one service what its plan says, and by a full snapshot where that cannot be
    loaded.

    Args:
        spec: of this service alone.
        clients: what this service is to be sampled with.
        may_go_back: as `plan_next`.

    Raises:
        LeaseLostError: another cycle publishes to this service now.
        ServiceRefusedError: it cannot be hot-loaded from this store, or would answer no sample.
        FullSnapshotFailedError, SnapshotRejectedError: as `full_snapshot`.
    """
    name, store, readiness = service.access.service, baseline.store, spec.readiness
    if not may_go_back and not spec.again and (found := earlier.found(name)):
        return found
    expected = await preflight_service(
        spec.name, service, store, readiness.replica_count, content.adapted_model
    )
    await wait_for_replicas(spec.name, service, readiness, expected)
    is_adapter = content.kind is SnapshotKind.LORA
    for client in clients:
        await preflight_rollouts(
            spec.name, service, client, readiness, spec.sampling, is_adapter=is_adapter
        )
    plan = await plan_snapshot(
        spec,
        service,
        baseline,
        content,
        lease,
        served_before=earlier.served_before(name),
        may_go_back=may_go_back,
    )
    fallback = None
    try:
        spec = await with_checkpoint(spec, baseline, plan.identity)
        snapshot = await publish_snapshot(spec, service, baseline, content, plan, lease, expected)
    except NeedsFullSnapshotError as reason:
        fallback = str(reason)
        baseline.digests.doubt()
        emit_fallback(spec, service, plan, fallback)
        spec = await with_checkpoint(spec, baseline, "")
        snapshot = await full_snapshot(
            spec, content, fallback, lease, expected, baseline.workspace, service.label
        )
    baseline.reserved.pop(name, None)
    return ServicePublication(service=name, snapshot=snapshot, fallback=fallback)


def asked_by(
    clients: Collection[InferenceClient],
    service: HotLoadClient,
    services: Mapping[str, HotLoadClient],
) -> list[InferenceClient]:
    """List those of the clients that sample this one of the services."""
    name, all_ = service.access.service, services.values()
    return [client for client in clients if sampled_service(all_, client.access) == name]


async def publish_snapshot(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    plan: SnapshotPlan,
    lease: Lease,
    expected_replica_count: int | None,
) -> ServedSnapshot:
    """Carry the planned snapshot to every replica.

    Shards durable, then manifests, then the signal (design, rule 2). Every step finds what an
    earlier run of it has done, or another service's publication beside it, so a killed publication
    goes on where it was.

    Raises:
        NeedsFullSnapshotError: a full snapshot under a new identity can still succeed.
    """
    started, began_at, store = monotonic(), utc_now(), baseline.store
    carried: list[ShardBatch] = []
    # Nodes carry one snapshot at a time: each step of theirs is a process, which knows of no other.
    async with turn("the nodes" if spec.placement else plan.identity):
        manifest = await find_manifest(store, plan.identity)
        if manifest is None:
            manifest, carried = await _carry_all(spec, service, baseline, content, plan)
    published_at = monotonic()
    warnings = await signal_snapshot(service, store, manifest, lease)
    signalled_at = monotonic()
    convergence = await wait_until_ready(service, manifest, spec.readiness, expected_replica_count)
    converged_at = monotonic()
    if spec.readiness.probe_sessions and manifest.kind is not SnapshotKind.LORA:
        client = await _probing(spec, service)
        # The trainer's own figures are about its checkpoint: not about an earlier version's.
        probe = await read_probe(
            await place_of(spec), has_figures=manifest.content_sha256 == content.sha256
        )
        count = convergence.ready_count
        warnings += await probe_replicas(client, probe, manifest, spec.readiness, count)
    seconds = {
        "publish": published_at - started,
        "signal": signalled_at - published_at,
        "converge": converged_at - signalled_at,
    }
    published = ServedSnapshot.of(
        manifest, plan.reason, carried, convergence, warnings, seconds, began_at=began_at
    )
    emit_served(spec, service, published)
    return published


async def _carry_all(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    content: CheckpointContent,
    plan: SnapshotPlan,
) -> tuple[SnapshotManifest, list[ShardBatch]]:
    view = await view_of(spec)
    carried = await carry_content(spec, service, baseline, view, content, plan)
    shards = tuple(shard for batch in carried for shard in batch.shards)
    has_index = service.access.api.codec == "coreweave"
    manifest = await upload_manifests(
        baseline.store,
        view,
        plan,
        content,
        shards,
        baseline.digests,
        baseline.workspace.delta(plan.identity) if has_index else None,
    )
    return manifest, carried


async def _probing(spec: CycleSpec, service: HotLoadClient) -> InferenceClient:
    """Open what asks the replicas of a service: what the cycle samples with, if that is of it."""
    opened = [(await RolloutClient.load(name)).open() for name in spec.sampled_with]
    if not service.is_one_of_several:
        return opened[0]
    ours = [one for one in opened if one.access.service == service.access.service]
    return ours[0] if ours else InferenceClient(service.access)


# A flow run of its own, with the reason among its parameters: a fallback is to be seen. Blocks are
# loaded again, because Prefect would store a flow's parameters.
@flow(name="full-snapshot", flow_run_name="full-for-{spec.name}{label}")
async def full_snapshot(
    spec: CycleSpec,
    content: CheckpointContent,
    reason: str,
    lease: Lease,
    expected_replica_count: int | None,
    workspace: Workspace,
    label: str = "",
) -> ServedSnapshot:
    """Publish a full snapshot under a new identity because of `reason`: the fallback.

    The ladder of protocol §18: a full, one more full, and where the spec allows it a ledger reset
    and a last full. A full that the service refuses by validation ends the ladder at once.

    Args:
        spec: of one service alone.
        label: names that service where the cycle has others.

    Raises:
        FullSnapshotFailedError: the ladder has no more rungs.
        SnapshotRejectedError: the service refuses the checkpoint itself.
    """
    service = replace(
        (await HotLoadService.load(spec.service)).open(), is_one_of_several=bool(label)
    )
    store = (await CheckpointStore.load(spec.store)).open()
    # Its digests begin anew: after a doubt, what was known is read again.
    baseline = await baseline_of(spec, workspace, store)
    may_reset = spec.snapshot.ledger_reset is LedgerReset.ON_FAILURE
    for rung in range(FULLS_TRIED + may_reset):
        if rung == FULLS_TRIED:
            await reset_ledger(service)
        await wait_until_settled(spec.name, service, spec.readiness)
        plan = await plan_fallback(
            service, store, content, reason, spec.run_id, spec.policy_version, spec.line
        )
        try:
            return await publish_snapshot(
                spec, service, baseline, content, plan, lease, expected_replica_count
            )
        except NeedsFullSnapshotError as error:
            reason = str(error)
    raise FullSnapshotFailedError(plan.identity, reason)
