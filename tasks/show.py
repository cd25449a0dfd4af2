"""Show: what a person sees of a cycle in Prefect, while it runs and when it has ended.

A bar for long steps, events for automations, the figures of the cycle as an artifact, what slows it
down, and a log that tells of a wrong input once. All of it only informs: whatever fails here is
logged.
"""

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow, State, get_run_logger, task
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    aupdate_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.settings import get_current_settings

from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.clients.store.records import page_path
from hotload.clients.store.run_records import read_history
from hotload.clock import monotonic
from hotload.errors import (
    InvalidCheckpointError,
    InvalidInputError,
    InvalidProblemsError,
    RewardError,
    RolloutFunctionError,
    StoreError,
)
from hotload.identity import NamedVersion, read_cycle_name, slug
from hotload.publish.publication import ServedSnapshot
from hotload.publish.snapshot import SnapshotPlan
from hotload.report.cycle_report import CycleReport
from hotload.report.markdown import render_markdown
from hotload.report.run_history import RunHistory, RunVersion
from hotload.spec import CycleSpec

INPUT_ERRORS = (
    InvalidCheckpointError,
    InvalidInputError,
    InvalidProblemsError,
    RewardError,
    RolloutFunctionError,
)
TASK_LOGGER, FLOW_LOGGER = "prefect.task_runs", "prefect.flow_runs"
FAILED_BY_INPUT = re.compile(
    rf"Finished in state Failed\(.{{0,80}}({'|'.join(error.__name__ for error in INPUT_ERRORS)})"
)
SECONDS_BEFORE_THE_FIRST = 5.0
SECONDS_BETWEEN_UPDATES = 1.0
VERSIONS_SHOWN = 20
# Settings of Prefect's server: below this, it writes events in many small transactions.
BATCH_SIZE = 100
BATCH_SETTINGS = [
    (service, setting)
    for service in ("task_run_recorder", "event_persister")
    for setting in ("batch_size", "read_batch_size")
]

_ASKED: set[str | None] = set()
"""Servers, by address, whose settings this process has looked at."""


class _ToldOnce(logging.Filter):
    """Lets the log of a run tell an error about its input once, in its own words: Prefect would
    tell it four times, with tracebacks of what is no fault of the program.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_told_at_the_end = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, INPUT_ERRORS):
            if self.is_told_at_the_end or record.name == TASK_LOGGER:
                return False  # the flow ends with it
            record.msg, record.args, record.exc_info = str(error), (), None
        elif FAILED_BY_INPUT.match(text := record.getMessage()):
            record.msg, record.args = text.partition("(")[0], ()
        return True


_TOLD_ONCE = _ToldOnce()


def tell_once(*, at_the_end: bool = False) -> None:
    """Tell an error about a cycle's input once in the log; not even that where a command line tells
    it `at_the_end`.
    """
    _TOLD_ONCE.is_told_at_the_end |= at_the_end
    for name in (TASK_LOGGER, FLOW_LOGGER):
        logging.getLogger(name).addFilter(_TOLD_ONCE)  # once, however often it is called


@contextmanager
def best_effort() -> Iterator[None]:
    """Log an error of the Prefect server, or an answer of another form: what only informs a person
    never fails a cycle."""
    try:
        yield
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        get_run_logger().warning("not shown in Prefect: %s", error)


class Progress:
    """A bar over `total` of anything, for a step that takes longer than 5 s; a shorter one makes no
    call to the server. At most one call a second, and the last."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, max(total, 1), 0
        self._artifact_id: UUID | None = None
        self._in_order = asyncio.Lock()
        self._due_at = monotonic() + SECONDS_BEFORE_THE_FIRST

    async def advance(self, done: int) -> None:
        """Move the bar by `done`."""
        self._done += done
        is_last = self._artifact_id is not None and self._done >= self._total
        if monotonic() < self._due_at and not is_last:
            return
        self._due_at = monotonic() + SECONDS_BETWEEN_UPDATES
        # Batches end side by side; an older update that arrived last would stay on the bar.
        async with self._in_order:
            with best_effort():
                await self._show(100.0 * self._done / self._total)

    async def _show(self, percent: float) -> None:
        if self._artifact_id is not None:
            await aupdate_progress_artifact(self._artifact_id, percent)
            return
        made = await acreate_progress_artifact(percent, description=self._description)
        self._artifact_id = made if isinstance(made, UUID) else None


def emit_served(spec: CycleSpec, service: HotLoadClient, snapshot: ServedSnapshot) -> None:
    """Emit `hotload.snapshot.served`: every replica of `service` serves `snapshot`."""
    _emit(
        "hotload.snapshot.served",
        NamedVersion(spec.run_id, spec.line, snapshot.policy_version),
        service=service.access.service,
        identity=snapshot.identity,
        kind=snapshot.kind.value,
        previous=snapshot.previous,
        size_bytes=snapshot.size_bytes,
        replica_count=snapshot.replica_count,
        reason=snapshot.reason,
    )


def emit_waiting(spec_name: str, detail: str) -> None:
    """Emit `hotload.cycle.waiting`: a wait for replicas has lasted a minute."""
    named = read_cycle_name(spec_name)
    if named is None:
        return
    _emit("hotload.cycle.waiting", named, detail=detail)


def emit_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Emit `hotload.cycle.failed`: the cycle stopped with an error; a hook of the flow."""
    spec = flow_run.parameters.get("spec")
    if not isinstance(spec, Mapping | CycleSpec):
        return
    data = dict(spec)
    version = NamedVersion(str(data["run_id"]), data.get("line", 0), data["policy_version"])
    _emit("hotload.cycle.failed", version, state=state.name, message=state.message)


def emit_fallback(spec: CycleSpec, service: HotLoadClient, plan: SnapshotPlan, reason: str) -> None:
    """Emit `hotload.cycle.fell-back`: the plan cannot be loaded, a full snapshot follows."""
    _emit(
        "hotload.cycle.fell-back",
        spec.version,
        service=service.access.service,
        identity=plan.identity,
        kind=plan.kind.value,
        reason=reason,
    )


def emit_service_failure(spec: CycleSpec, service: HotLoadClient, reason: str) -> None:
    """Emit `hotload.cycle.service-failed`: one of several does not serve this version, the others
    go on."""
    name = service.access.service
    _emit("hotload.cycle.service-failed", spec.version, service=name, reason=reason)


def _emit(event: str, version: NamedVersion, **payload: Any) -> None:
    run_id = version.run_id
    emit_event(
        event,
        resource={
            "prefect.resource.id": f"hotload.run.{run_id}",
            "prefect.resource.name": run_id,
        },
        payload={"policy_version": version.policy_version, "line": version.line, **payload},
    )


@task(cache_policy=NO_CACHE, task_run_name="show-{report.name}")
async def show_cycle(store: Store, report: CycleReport) -> None:
    """Show an ended cycle: the next version of the run's artifact, and `hotload.cycle.ended`."""
    _emit(
        "hotload.cycle.ended",
        NamedVersion(report.run_id, report.line, report.policy_version),
        outcome=report.outcome,
        identity=report.snapshot.identity,
        group_count=report.rollouts.group_count,
        mean_reward=report.rollouts.mean_reward,
        parts_uri=report.rollouts.parts_uri,
        seconds=report.seconds,
    )
    versions = await _read_versions(store, report)
    with best_effort():
        await acreate_markdown_artifact(
            render_markdown(report, versions, f"{store.url}/{page_path(report.name)}"),
            key=slug(f"hotload-{report.run_id}"),
            description=f"Training run {report.run_id}: its versions, and the last cycle's figures",
        )
    with best_effort():
        await _warn_of_a_slow_server()


async def _read_versions(store: Store, report: CycleReport) -> list[RunVersion]:
    """Read the rows of the versions up to this one, oldest first; it alone where that fails."""
    try:
        history = await read_history(store, report.run_id)
    except StoreError as error:
        get_run_logger().warning("the versions before are not shown: %s", error)
        history = RunHistory(run_id=report.run_id)
    versions = history.adding([RunVersion.of(report, {})]).versions
    shown = [one for one in versions if one.order <= (report.line, report.policy_version)]
    return shown[-VERSIONS_SHOWN:]


async def _warn_of_a_slow_server() -> None:
    """Log the server's settings that make every cycle seconds longer, if it has them; a process of
    many cycles asks once."""
    if (url := get_current_settings().api.url) in _ASKED:
        return
    _ASKED.add(url)
    async with get_client() as client:
        answer = await client.request("GET", "/admin/settings")
    services: dict[str, Any] = answer.json()["server"]["services"]
    small = {
        f"PREFECT_SERVER_SERVICES_{service}_{setting}".upper(): services[service][setting]
        for service, setting in BATCH_SETTINGS
        if services[service][setting] < BATCH_SIZE
    }
    if small:
        get_run_logger().warning(
            "the Prefect server writes events one by one, which costs a cycle seconds: set there, "
            "as deployments/README.md says under SQLite, %s",
            ", ".join(f"{name}=500 (now {value})" for name, value in small.items()),
        )
