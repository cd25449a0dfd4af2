"""Arrivals: a cycle for every checkpoint that a trainer puts below a directory.

Nothing is remembered: which cycles have ended stands in the store, which were triggered on the
server. A version that fails is tried again, after waits that grow, until a later one has ended.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hotload.clients.store import Store
from hotload.clients.store.run_records import last_ended_version
from hotload.clients.trigger import publish
from hotload.clock import monotonic, utc_now
from hotload.directory.arrivals import Arrival, find_arrivals, strangers_among, to_publish
from hotload.directory.places import RemotePlace
from hotload.errors import HotLoadError, shorten
from hotload.quantities import plural
from hotload.spec import CycleSpec, WatchSpec

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 10.0, 600.0
PATIENCE_SECONDS = 5.0
ATTEMPTS = 3
STRANGERS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class CycleOutcome:
    """How a cycle stands, in words; `is_good` where it has ended well, or goes on."""

    words: str
    is_good: bool


RunCycle = Callable[[CycleSpec, int], Awaitable[CycleOutcome]]
"""Runs a cycle, given the number of the attempt, from 1 on."""


async def look(spec: WatchSpec, store: Store, parent: Path | RemotePlace) -> tuple[Arrival, ...]:
    """Find the versions that are due, and then those that are not complete yet.

    Args:
        parent: the directory that the spec names, or the place of its URL.

    Raises:
        InvalidCheckpointError: the directory cannot be read.
        StoreError: the store refuses, or one of the two does not answer.
    """
    ended = await last_ended_version(store, spec.cycle.run_id, spec.cycle.line)
    last = max((one for one in (ended, spec.after_version) if one is not None), default=None)
    arrivals = await asyncio.to_thread(
        find_arrivals,
        parent,
        re.compile(spec.name),
        after=last,
        marker=spec.marker,
        still_seconds=spec.still_seconds,
        now=utc_now().timestamp(),
    )
    return to_publish(arrivals, newest_only=spec.newest_only)


async def publish_due(
    spec: WatchSpec,
    store: Store,
    parent: Path | RemotePlace,
    run_cycle: Callable[[CycleSpec], Awaitable[CycleOutcome]],
) -> AsyncIterator[str]:
    """Look once, and run the cycle of every version that is due; yields a line for each version, or
    one that says why nothing there is one.

    Raises:
        InvalidCheckpointError, StoreError: as `look`.
    """
    arrivals = await look(spec, store, parent)
    if not arrivals and (why := await asyncio.to_thread(_why_nothing, spec, parent)):
        yield why
    for arrival in arrivals:
        words = f"waits for {arrival.waits_for}"
        if not arrival.waits_for:
            words = (await run_cycle(spec.cycle_of(str(arrival.directory), arrival.version))).words
        yield f"{arrival.directory.name}: {words}"


async def watch(
    spec: WatchSpec,
    store: Store,
    parent: Path | RemotePlace,
    run_cycle: RunCycle,
    say: Callable[[str], object],
    every_seconds: float,
) -> None:
    """Look again and again, and run what is due; never ends. Says what has changed.

    What cannot be looked at is said, and looked at again.
    """
    said: dict[str, str] = {}
    retries = _Retries(run_cycle)

    def say_once(name: str, line: str) -> None:
        if said.get(name) != line:
            said[name] = line
            say(line)

    while True:
        try:
            async for line in publish_due(spec, store, parent, retries.run):
                say_once(line.partition(":")[0], line)
        except (HotLoadError, ValueError) as error:
            say_once("", f"looked in vain: {error}")
        await asyncio.sleep(every_seconds)


def _why_nothing(spec: WatchSpec, parent: Path | RemotePlace) -> str:
    """Say what lies there instead of versions, if anything: the pattern may be the wrong one."""
    names = strangers_among(parent, re.compile(spec.name))
    if not names:
        return ""
    shown = ", ".join(shorten(name) for name in names[:STRANGERS_SHOWN])
    more = ", …" if len(names) > STRANGERS_SHOWN else ""
    return (
        f"no version among {plural(len(names), 'name')} ({shown}{more}): expected {spec.name}; "
        "--name says how versions are named"
    )


class _Retries:
    """Runs cycles; one that failed in its next attempt, after a wait that doubles each time."""

    def __init__(self, run_cycle: RunCycle) -> None:
        self._run_cycle = run_cycle
        self._attempts: Counter[str] = Counter()
        self._failed: dict[str, tuple[CycleOutcome, float]] = {}

    async def run(self, cycle: CycleSpec) -> CycleOutcome:
        before, due_at = self._failed.get(cycle.name, (None, 0.0))
        if before is not None and monotonic() < due_at:
            return before
        failures = self._attempts[cycle.name]
        outcome = await self._run_cycle(cycle, failures + 1)
        if not outcome.is_good:
            self._attempts[cycle.name] += 1
            wait = min(FIRST_WAIT_SECONDS * 2.0 ** min(failures, 10), LONGEST_WAIT_SECONDS)
            self._failed[cycle.name] = outcome, monotonic() + wait
        return outcome


async def run_by_deployment(
    cycle: CycleSpec, attempt: int, *, deployment: str, api_url: str, authorization: str | None
) -> CycleOutcome:
    """Have a deployment run a cycle, or find the run of this attempt."""
    trigger = partial(
        publish,
        api_url,
        cycle.model_dump(mode="json"),
        deployment=deployment,
        attempt=attempt,
        authorization=authorization,
        wait=False,
        patience_seconds=PATIENCE_SECONDS,
    )
    try:
        run = await asyncio.to_thread(trigger)
    except (HotLoadError, ValueError) as error:
        return CycleOutcome(f"not triggered: {error}", is_good=False)
    is_good = run.is_completed or not run.has_ended
    return CycleOutcome(f"{run.state} {run.message}".rstrip(), is_good)


async def first_good(cycle: CycleSpec, *, run_cycle: RunCycle) -> CycleOutcome:
    """Run a cycle in the first of three attempts that does not fail, or has not failed before."""
    for attempt in range(1, ATTEMPTS + 1):
        outcome = await run_cycle(cycle, attempt)
        if outcome.is_good:
            break
    return outcome
