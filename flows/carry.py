"""Carry: shards are read, encoded and uploaded where they are placed, here or on nodes.

A node does with its share what a cycle without a placement does with all shards, by the same steps.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from flows.sampling import sample_share
from hotload.clients.nodes import NodeAnswer, NodeWork, foreseen_by_all
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.directory.relayout import CheckpointView
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import CheckpointContent, ShardBatch, SnapshotPlan, batches
from hotload.publish.workspace import Workspace
from hotload.records import FileDigest
from hotload.sampling.nodes.notes import SamplingShare
from hotload.spec import CycleSpec
from tasks.announce import hint_shards
from tasks.baseline import Baseline, baseline_of, keep_baseline
from tasks.encode import DeltaEncoder, encode_once
from tasks.nodes import answer_of, ask_node, hold_share, leave_answer, read_share
from tasks.show import Progress
from tasks.upload import Source, upload_once
from tasks.validate import view_of

# Every task run costs the server work (about 30 ms), so many shards share one.
BATCHES = 25


async def carry_shards(
    service: HotLoadClient,
    baseline: Baseline,
    view: CheckpointView,
    plan: SnapshotPlan,
    shards: Sequence[FileDigest],
) -> list[ShardBatch]:
    """Encode, upload and hint shards in this process, in batches that overlap.

    Raises:
        InvalidCheckpointError: the trainer changed a file since it was validated.
        BaselineLostError, SelfCheckError: a delta cannot be had; a full snapshot can.
        StoreError: the store refuses.
    """
    size_bytes = sum(shard.size_bytes for shard in shards)
    progress = Progress(f"{plan.kind.value} {plan.identity}", size_bytes)
    codec = service.access.api.codec
    with DeltaEncoder(baseline.workspace, view, plan, baseline.digests, codec) as encoder:
        return await overlap(
            _carry(encoder, service, baseline.store, batch, progress)
            for batch in batches(shards, BATCHES)
        )


async def _carry(
    encoder: DeltaEncoder,
    service: HotLoadClient,
    store: Store,
    files: tuple[FileDigest, ...],
    progress: Progress,
) -> ShardBatch:
    """Encode, upload and hint one batch, while other batches are at other steps."""
    plan = encoder.plan
    source: Source = encoder.view
    batch = ShardBatch.as_written(files)
    if plan.kind is SnapshotKind.DELTA:
        batch, source = await encode_once(encoder, files), encoder.directory
    results, digests = encoder.workspace.results, encoder.digests
    batch = await upload_once(store, plan.identity, source, batch, results, digests)
    if service.hint_body_template is not None:
        batch = await hint_shards(service, store, plan, batch)
    await progress.advance(sum(file.size_bytes for file in files))
    return batch


async def work_here(work: NodeWork, work_dir: Path) -> NodeAnswer:
    """Do one step of a node's share in this process, in `work_dir`.

    Raises:
        InvalidCheckpointError, NeedsFullSnapshotError, StoreError: as the step itself.
    """
    spec, plan = work.spec, work.plan
    store = (await CheckpointStore.load(spec.store)).open()
    workspace = Workspace(work_dir / work.share, work.account_id, work.deployment_id)
    baseline = await baseline_of(spec, workspace, store, work.files)
    baseline.reserved = {"": frozenset(work.reserved)}
    if work.step == "keep":
        await keep_baseline(baseline, *work.identities)
        return NodeAnswer(trouble=baseline.trouble)
    view = await view_of(spec)
    if plan is None:
        return await read_share(work, baseline, view)
    await hold_share(work, baseline, view)
    service = (await HotLoadService.load(spec.service)).open()
    carried = await carry_shards(service, baseline, view, plan, work.digests)
    return NodeAnswer(batches=tuple(carried))


@flow(
    name="node",
    flow_run_name="{work.step}-{work.spec.name}-{work.share}",
    persist_result=False,
)
async def work_on_share(work: NodeWork | SamplingShare, work_dir: str) -> None:
    """Do one step of a share of a cycle's shards, and leave the answer in the store; or sample a
    share of its rollout's parts.

    Args:
        work: what to do.
        work_dir: a directory on this machine's own disk for baselines and unfinished files; saved
            with the deployment.

    Raises:
        InvalidCheckpointError, StoreError: as `answer_of`; another node may do better.
        HotLoadError: as `sample_share`.
    """
    if isinstance(work, SamplingShare):
        await sample_share(work)
        return
    answer = await answer_of(work_here(work, Path(work_dir)))
    await leave_answer((await CheckpointStore.load(work.spec.store)).open(), answer)


async def work_on_nodes(
    spec: CycleSpec, baseline: Baseline, files: Sequence[str], **step: Any
) -> dict[str, NodeAnswer]:
    """Have every share of these files worked on, by its own node or another; returns the answers.

    Args:
        step: what else NodeWork says of the step; `digests` are those of all files.

    Raises:
        InvalidCheckpointError, NeedsFullSnapshotError, StoreError: as the step itself.
    """
    digests: Collection[FileDigest] = step.pop("digests", ())
    works = [
        NodeWork(
            spec=spec,
            share=share,
            account_id=baseline.workspace.account_id,
            deployment_id=baseline.workspace.deployment_id,
            files=placed,
            reserved=tuple(frozenset().union(*baseline.reserved.values())),
            digests=tuple(one for one in digests if one.file in placed),
            **step,
        )
        for share, placed in spec.shares_of(files).items()
    ]
    answers = await overlap(_work_somewhere(work, baseline.store) for work in works)
    return {work.share: answer for work, answer in zip(works, answers, strict=True)}


async def _work_somewhere(work: NodeWork, store: Store) -> NodeAnswer:
    """Work on a share on its node, else on the first after it that does, else here."""
    nodes = list(work.spec.placement)
    own = nodes.index(work.share)
    for node in nodes[own:] + nodes[:own]:
        if (answer := await ask_node(node, work, store)) is not None:
            return answer
    return await work_here(work, Path(work.spec.work_dir))


async def read_on_nodes(
    files: Sequence[str], spec: CycleSpec, baseline: Baseline, bases: Collection[str]
) -> list[FileDigest]:
    """Have the digests of shards read where they are placed, and deltas on `bases` foreseen.

    Raises:
        InvalidCheckpointError: a file cannot be read.
    """
    answers = await work_on_nodes(spec, baseline, files, step="read", identities=tuple(bases))
    baseline.foreseen = foreseen_by_all(answers)
    found = {one.file: one for answer in answers.values() for one in answer.digests}
    return [found[file] for file in files]


async def carry_content(
    spec: CycleSpec,
    service: HotLoadClient,
    baseline: Baseline,
    view: CheckpointView,
    content: CheckpointContent,
    plan: SnapshotPlan,
) -> list[ShardBatch]:
    """Encode, upload and hint all shards of a checkpoint where they are placed.

    Raises:
        InvalidCheckpointError, NeedsFullSnapshotError, StoreError: as `carry_shards`.
    """
    if not spec.placement:
        return await carry_shards(service, baseline, view, plan, content.shards)
    files = [shard.file for shard in content.shards]
    answers = await work_on_nodes(
        spec, baseline, files, step="carry", plan=plan, digests=content.shards
    )
    return [batch for answer in answers.values() for batch in answer.batches]


async def keep_baselines(
    spec: CycleSpec, baseline: Baseline, content: CheckpointContent, identities: Sequence[str]
) -> None:
    """Move the baseline on to what every replica has confirmed, wherever it lies.

    Raises:
        StoreError: the store has no manifest of one.
    """
    if not spec.placement:
        await keep_baseline(baseline, *identities)
        return
    files = [shard.file for shard in content.shards]
    answers = await work_on_nodes(spec, baseline, files, step="keep", identities=tuple(identities))
    troubles = (answer.trouble for answer in answers.values())
    baseline.trouble = next(filter(None, troubles), None)
