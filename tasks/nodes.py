"""Nodes: a share of the shards is worked on where it is placed, as a run of that node's deployment;
a share of a rollout's parts is sampled so.

A node that does not begin, or whose run fails, is passed over: the next one, and in the end the
cycle's own process, makes what it lacks from the store.
"""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelling

from hotload.clients.nodes import NodeAnswer, NodeWork, take_answer, write_answer
from hotload.clients.store import Store
from hotload.clients.store.records import read_snapshot_manifest
from hotload.clock import monotonic
from hotload.directory.relayout import CheckpointView
from hotload.errors import (
    BaselineLostError,
    InvalidCheckpointError,
    LayoutMismatchError,
    NeedsFullSnapshotError,
)
from hotload.publish.snapshot import Foreseen
from hotload.sampling.nodes.notes import SamplingShare
from tasks import RETRIED
from tasks.baseline import Baseline
from tasks.plan import foresee_delta
from tasks.validate import digest_shards

FLOW = "node"
BEGIN_SECONDS = 120.0
LOOK_SECONDS, LOOK_SECONDS_AT_MOST = 0.25, 5.0
OF_THE_MACHINE = frozenset({"missing_directory", "not_a_directory", "missing_file", "unreadable"})
"""Rules that another machine may find kept: this one has lost its mount, or may not read."""


@task(cache_policy=NO_CACHE, task_run_name="{work.step}-{work.share}-on-{node}", **RETRIED)
async def ask_node(node: str, work: NodeWork, store: Store) -> NodeAnswer | None:
    """Have a node work on a share, and take its answer; None if it is not there, or died.

    Raises:
        InvalidCheckpointError, NeedsFullSnapshotError: it is the share that cannot be worked on.
        StoreError: the store refuses.
    """
    run = await _run_on(node, work)
    return None if run is None else await take_answer(store, str(run.id), work)


@task(cache_policy=NO_CACHE, task_run_name="sample-{work.share}-on-{node}", **RETRIED)
async def sample_on_node(node: str, work: SamplingShare) -> bool:
    """Have a node sample a share of a rollout; False if it is not there, or died. What it put, and
    whether anything is missing, the store says.
    """
    return await _run_on(node, work) is not None


async def _run_on(node: str, work: NodeWork | SamplingShare) -> FlowRun | None:
    """Run work on a node, and wait until it has ended; None if it did not succeed."""
    async with get_client() as client:
        if reason := await _why_not(client, node):
            get_run_logger().warning("node %s is passed over: %s", node, reason)
            return None
        parameters = {"work": work.model_dump(mode="json")}
        run: FlowRun = await arun_deployment(
            f"{FLOW}/{node}", client=client, parameters=parameters, timeout=0
        )
        ended = await _ended(client, run)
    if not ended.state or not ended.state.is_completed():
        said = f"{ended.state.name}: {ended.state.message}" if ended.state else "no state"
        get_run_logger().warning("node %s is passed over: its run is %s", node, said)
        return None
    return ended


async def _why_not(client: PrefectClient, node: str) -> str | None:
    """Say why there is no sense in asking a node; None where there is."""
    try:
        found: DeploymentResponse = await client.read_deployment_by_name(f"{FLOW}/{node}")
    except ObjectNotFound:
        makes = f"python -m flows.serve --node {node} --work-dir …"
        return f"no deployment {FLOW}/{node}: `{makes}` makes it"
    is_ready = found.status is None or found.status.value == "READY"
    return None if is_ready else f"no worker asks for the work of {FLOW}/{node}"


async def _ended(client: PrefectClient, run: FlowRun) -> FlowRun:
    """Wait until a run has ended, and cancel it where it does not begin or we are ended."""
    asked_at = monotonic()
    try:
        while not (run.state and run.state.is_final()):
            waits = run.state is None or run.state.is_scheduled() or run.state.is_pending()
            if waits and monotonic() - asked_at > BEGIN_SECONDS:
                break
            # A long run is asked after less often: there may be many, and one server.
            passed = monotonic() - asked_at
            await asyncio.sleep(min(max(LOOK_SECONDS, passed / 20), LOOK_SECONDS_AT_MOST))
            run = await client.read_flow_run(run.id)
    finally:
        if not (run.state and run.state.is_final()):
            message = f"did not begin within {BEGIN_SECONDS:.0f} s, or its cycle has ended"
            await client.set_flow_run_state(run.id, Cancelling(message=message))
    return await client.read_flow_run(run.id)


@task(cache_policy=NO_CACHE, task_run_name="read-{work.share}", **RETRIED)
async def read_share(work: NodeWork, baseline: Baseline, view: CheckpointView) -> NodeAnswer:
    """Read the digests of a share's shards, and foresee a delta on every base that is whole here.

    Nothing is built: the cycle that asks holds no lease yet. What was read is remembered for the
    process that encodes.

    Raises:
        InvalidCheckpointError: a file cannot be read.
    """
    spec = work.spec
    headers = [shard for shard in view.checkpoint.shards if shard.file in work.files]
    is_trusted = spec.snapshot.trust_digests
    name = f"{spec.name}, {work.share}"
    digests = await digest_shards(name, view, headers, baseline.digests, is_trusted=is_trusted)
    foreseen: dict[str, Foreseen] = {}
    bases: list[Path] = []
    for identity in work.identities:
        manifest = await read_snapshot_manifest(baseline.store, identity)
        if manifest is not None and (base := await baseline.find(manifest)):
            bases.append(base)
            foreseen[identity] = await asyncio.to_thread(
                foresee_delta, base, lambda: view, work.files
            )
    near = [view.directory] if isinstance(view.directory, Path) else []
    await asyncio.to_thread(baseline.digests.remember, [*bases, *near])
    return NodeAnswer(digests=digests, foreseen=foreseen)


@task(cache_policy=NO_CACHE, task_run_name="hold-{work.share}", **RETRIED)
async def hold_share(work: NodeWork, baseline: Baseline, view: CheckpointView) -> None:
    """Hold the base of a share's deltas here, built from the store where it is not.

    Raises:
        BaselineLostError, LayoutMismatchError: no delta on it can be encoded.
    """
    previous = work.plan and work.plan.previous
    if not previous:
        baseline.digests.doubt()  # a full is read anew
        return
    manifest = await read_snapshot_manifest(baseline.store, previous)
    if manifest is None:
        raise BaselineLostError(previous, "the store has no manifest of it")
    base = await baseline.hold(manifest)
    foreseen = await asyncio.to_thread(foresee_delta, base, lambda: view, work.files)
    if foreseen.obstacle is not None:
        raise LayoutMismatchError(foreseen.obstacle)


async def answer_of(step: Coroutine[Any, Any, NodeAnswer]) -> NodeAnswer:
    """Do a step, and make an answer too of the errors that it would meet anywhere.

    Raises:
        InvalidCheckpointError, StoreError: another node may do better.
    """
    try:
        return await step
    except InvalidCheckpointError as error:
        if not OF_THE_MACHINE.isdisjoint(finding.rule for finding in error.findings):
            raise
        return NodeAnswer.of_error(error)
    except NeedsFullSnapshotError as error:
        return NodeAnswer.of_error(error)


@task(cache_policy=NO_CACHE, task_run_name="answer", **RETRIED)
async def leave_answer(store: Store, answer: NodeAnswer) -> None:
    """Leave the answer of the flow run that this is part of in the store.

    Raises:
        StoreError: the store refuses.
    """
    await write_answer(store, str(flow_run.id), answer)
