"""Sampling: every problem of this policy version sampled, scored and handed back."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from prefect import get_run_logger

from blocks.checkpoint_store import CheckpointStore
from blocks.rollout_client import RolloutClient
from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutPlan, share_parts
from hotload.report.earlier_run import EarlierRun
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.nodes.coordinator import RolloutNodes
from hotload.sampling.nodes.notes import SamplingShare
from hotload.sampling.nodes.share import NamedElsewhere, NodeRollout, check_plan
from hotload.sampling.part_carrier import PartCarrier, Together
from hotload.sampling.processes.coordinator import open_carrier
from hotload.sampling.rollout import SampledService
from hotload.spec import CycleSpec
from tasks.nodes import sample_on_node
from tasks.publication import OngoingPublication, sources_of
from tasks.roll_out import (
    find_files,
    find_rollout,
    hand_back,
    read_rollout_plan,
    roll_out_chunk,
    roll_out_part,
    warm_up,
)
from tasks.show import Progress


async def load_rollouts(spec: CycleSpec) -> dict[str, InferenceClient]:
    """Open what the cycle samples with, by the names of its blocks."""
    return {name: (await RolloutClient.load(name)).open() for name in spec.sampled_with}


async def roll_out_and_score(
    spec: CycleSpec,
    ongoing: OngoingPublication,
    earlier: EarlierRun,
    clients: Mapping[str, InferenceClient],
    services: Mapping[str, HotLoadClient],
    store: Store,
) -> RolloutSummary:
    """Sample from the published snapshot, as soon as enough services serve it.

    Where the next cycle may publish meanwhile, each service is watched for newer versions. Samples
    that an earlier run of the cycle took from the same weights are not taken again.

    Raises:
        As `roll_out`.
    """
    served = await ongoing.sampled()
    if done := await find_earlier_rollout(spec, store, earlier):
        return done
    sources = sources_of(spec, served, clients, services.values())
    return await roll_out(spec, sources, store)


async def find_earlier_rollout(
    spec: CycleSpec, store: Store, earlier: EarlierRun
) -> RolloutSummary | None:
    """Find what an ended run of this cycle sampled, if it is still there; None to sample now."""
    if earlier.report is None or spec.again:
        return None
    ended = earlier.report.rollouts
    directory = ended.parts_uri.removeprefix(f"{store.url}/")
    return await find_rollout(store, directory, ended.declaration_sha256)


async def roll_out(
    spec: CycleSpec, sources: Sequence[SampledService], store: Store
) -> RolloutSummary:
    """Sample the problems in chunks, score the groups, leave them as Parquet in the store.

    Groups are written as they finish, with a manifest that says so far. Started again, it samples
    only what is not in the store yet.

    Args:
        spec: what to sample, how, and what scores it.
        sources: what every replica of a service was seen to serve, of one or of several that share
            the parts by their weights; the rollouts lie under what the first serves.

    Raises:
        InvalidProblemsError, RewardError, RolloutFunctionError: the caller's input; nothing was
            sampled.
        ServiceRefusedError, RewardError: no sample can succeed, or the reward's service refuses its
            key; started again, it goes on.
        RolloutsFailedError: the service failed row after row; started again, it goes on.
        StoreError: the store refuses.
    """
    plan = await read_rollout_plan(spec, sources[0].identity, store)
    if done := await find_rollout(store, plan.directory, plan.digest):
        return done
    await overlap(warm_up(source.client, spec.readiness) for source in sources)
    together = Together(plan, store, get_run_logger())
    if spec.sampling.nodes and await _sample_on_nodes(spec, plan, sources, store, together):
        manifest = together.manifest(is_complete=True)
        return await hand_back(store, manifest, plan.path(MANIFEST_FILE))
    progress = Progress(f"rollouts {plan.identity}", plan.problem_count)
    shares = share_parts(plan.parts, [source.weight for source in sources])
    # Of few parts a small weight gets none.
    shared = [(one, numbers) for one, numbers in zip(sources, shares, strict=True) if numbers]
    async with AsyncExitStack() as opened:
        rollouts = [
            await opened.enter_async_context(
                open_carrier(
                    spec,
                    plan,
                    source,
                    store,
                    get_run_logger(),
                    numbers=numbers,
                    together=together,
                    service_count=len(shared),
                )
            )
            for source, numbers in shared
        ]
        await overlap(
            _carry(rollout, number, progress)
            for rollout, (_, numbers) in zip(rollouts, shared, strict=True)
            for number in sorted(numbers)
        )
        for rollout in rollouts:
            rollout.log_window()
        manifest = rollouts[0].manifest(is_complete=True)
    return await hand_back(store, manifest, plan.path(MANIFEST_FILE))


async def _sample_on_nodes(
    spec: CycleSpec,
    plan: RolloutPlan,
    sources: Sequence[SampledService],
    store: Store,
    together: Together,
) -> bool:
    """Have nodes sample what is missing in the store; whether nothing is, when they have ended."""
    progress = Progress(f"rollouts {plan.identity} on nodes", plan.problem_count)
    logger = get_run_logger()
    nodes = RolloutNodes(spec, plan, sources, store, logger, together, progress.advance)
    if not await find_files(nodes):
        return True
    async with nodes.talking():
        await overlap(_sample_somewhere(work) for work in nodes.shares())
    if missing := await find_files(nodes):
        logger.warning("nodes left %d problems, which are sampled here", missing)
        together.begin_again()
    return not missing


async def _sample_somewhere(work: SamplingShare) -> None:
    """Have a share sampled by its node, else by the first after it that does."""
    for node in work.nodes:
        if await sample_on_node(node, work):
            return


async def sample_share(work: SamplingShare) -> None:
    """Sample a share of a rollout's parts in this process, and put them into the store.

    Raises:
        InvalidProblemsError: what is read here makes another plan.
        ServiceRefusedError, RewardError, RolloutFunctionError: no sample can succeed on this node.
        StoreError: the store refuses, or nothing was heard of the cycle for a minute.
    """
    spec = work.spec
    store = (await CheckpointStore.load(spec.store)).open()
    plan = await read_rollout_plan(spec, work.identity, store)
    check_plan(work, plan)
    together = NamedElsewhere(plan, store, get_run_logger())
    async with AsyncExitStack() as opened:
        carriers = {
            one.rollouts: await opened.enter_async_context(
                open_carrier(
                    work.spec_of(one),
                    plan,
                    SampledService((await RolloutClient.load(one.rollouts)).open(), one.identity),
                    store,
                    get_run_logger(),
                    numbers=one.parts,
                    together=together,
                    service_count=len(work.services),
                )
            )
            for one in work.services
        }
        async with NodeRollout(work, carriers, store).listening():
            await overlap(
                roll_out_part(carriers[one.rollouts], number)
                for one in work.services
                for number in one.parts
            )
        for carrier in carriers.values():
            carrier.log_window()


async def _carry(rollout: PartCarrier, number: int, progress: Progress) -> None:
    await roll_out_chunk(rollout, number)
    await progress.advance(len(rollout.plan.parts[number].problems))
