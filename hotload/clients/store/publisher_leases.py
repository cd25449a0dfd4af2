"""The publisher's lease: hold the right to publish to a service for as long as a cycle runs.

`hotload.publish.lease` decides; this module reads and writes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from hotload.clients.store.failures import asked_again
from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.errors import LeaseLostError, StoreError
from hotload.publish.lease import (
    LEASE_LIMIT_BYTES,
    LEASES,
    RENEWALS_PER_TTL,
    RETENTION,
    TOKEN_DIGITS,
    TTL_SECONDS,
    Lease,
    Process,
    decide,
    why_lost,
)

LEASE = "the publisher lease"

logger = logging.getLogger(__name__)


def lease_log(store: Store, service: str) -> LeaseLog:
    """Name the log of a service's publishers; an entry's number is its lease's token."""
    directory = f"{LEASES}/{service}" if service else LEASES
    return LeaseLog(store, directory, first=1, digits=TOKEN_DIGITS, limit_bytes=LEASE_LIMIT_BYTES)


@asynccontextmanager
async def publisher_lease(
    store: Store,
    service: str,
    holder: str,
    *,
    ttl_seconds: float = TTL_SECONDS,
) -> AsyncIterator[Lease]:
    """Hold `service`, which loads from `store`, for `holder`, a name a person recognises.

    Yields the lease as it was taken; with it, `check_lease` tells whether it still is held.
    Renewed four times per `ttl_seconds` in the background, given back at the end. A publisher on
    this host that was killed is taken over at once, any other when its lease has expired. Uploads
    that earlier publishers left unfinished are aborted where no other service is being published
    to: then nobody else may upload here now.

    Raises:
        LeaseLostError: another publisher holds it, or snapshots are being removed from the store.
        StoreError: the store cannot be read or written.
    """
    log = lease_log(store, service)
    mine = await _acquire(log, service, holder, ttl_seconds)
    done = asyncio.Event()
    renewing = asyncio.create_task(_keep(log, mine, ttl_seconds, done))
    try:
        # Only now, while it is renewed: tidying can take longer than the lease lasts. We write ours
        # and then look at the others', as a removal does: so one of the two sees the other.
        held = await asked_again(LEASE, lambda: held_leases(store))
        others = [lease for lease in held if lease.nonce != mine.nonce]
        _refuse_beside(others, mine)
        await _tidy(log, mine.token, may_abort=not others)
        yield mine
    finally:
        # Never cancelled: a renewal under way could arrive after the lease was given back.
        done.set()
        await renewing
        await _give_back(log, mine)


async def check_lease(store: Store, mine: Lease) -> None:
    """Return if the holder of this lease still may signal. Ask right before a signal, every time.

    Raises:
        LeaseLostError: another publisher took over, or the lease expired unrenewed.
        StoreError: the store cannot be read; whether the lease is held is unknown.
    """
    latest = await _highest(lease_log(store, mine.service))
    reason = why_lost(latest, mine, now=utc_now())
    if reason is not None:
        another = latest.holder if latest and latest.nonce != mine.nonce else None
        raise LeaseLostError(another, reason)


@asynccontextmanager
async def every_lease(store: Store, services: Iterable[str]) -> AsyncIterator[tuple[Lease, ...]]:
    """Hold the store for `RETENTION`: nobody publishes to any of its services meanwhile.

    Args:
        services: those that are known; whoever has published here before is found.

    Raises:
        LeaseLostError: a cycle publishes, or another removes.
        StoreError: as `publisher_lease`.
    """
    known, leases = {RETENTION, *services}, dict[str, Lease]()
    async with AsyncExitStack() as held:
        while missing := (known | await _leased_services(store)) - leases.keys():
            for service in sorted(missing, key=lambda one: (one != RETENTION, one)):
                lease = publisher_lease(store, service, RETENTION)
                leases[service] = await held.enter_async_context(lease)
        yield tuple(leases.values())


async def held_leases(store: Store) -> list[Lease]:
    """Read the leases of a store that are held now, each for a service of its own.

    Raises:
        StoreError: the store cannot be read, or one is no lease.
    """
    me, now = this_process(), utc_now()
    held = []
    for service in sorted(await _leased_services(store)):
        latest = await _highest(lease_log(store, service))
        if latest is None:
            continue
        running = is_running(latest.process)
        if not decide(latest, now=now, me=me, cycle="", is_running=running).may_take:
            held.append(latest)
    return held


async def _leased_services(store: Store) -> set[str]:
    """Name the services that have leases here; the empty name is that of an earlier version's."""
    paths = (one.path.removeprefix(LEASES) for one in await store.objects(LEASES))
    return {path.rpartition("/")[0].removeprefix("/") for path in paths}


def _refuse_beside(others: Iterable[Lease], mine: Lease) -> None:
    """Raise LeaseLostError where another's lease stands for the whole store."""
    for other in others:
        if other.holder == RETENTION != mine.holder:
            reason = "snapshots are being removed from this store; start again when that has ended"
            raise LeaseLostError(other.holder, reason)
        if not other.service and other.holder != mine.holder:
            reason = "an earlier version of hotload publishes from this store; let it end first"
            raise LeaseLostError(other.holder, reason)


async def _acquire(log: LeaseLog, service: str, holder: str, ttl_seconds: float) -> Lease:
    nonce = secrets.token_hex(16)
    return await asked_again(LEASE, lambda: _take(log, service, holder, ttl_seconds, nonce))


async def _take(log: LeaseLog, service: str, holder: str, ttl_seconds: float, nonce: str) -> Lease:
    me = this_process()
    while True:
        latest = await _highest(log)
        now = utc_now()
        if latest is not None and latest.nonce == nonce:
            return latest  # made by an attempt whose answer was lost
        running = is_running(latest.process) if latest else None
        decision = decide(latest, now=now, me=me, cycle=holder, is_running=running)
        if latest is not None and not decision.may_take:
            raise LeaseLostError(latest.holder, decision.reason)
        mine = Lease(
            token=latest.token + 1 if latest else 1,
            nonce=nonce,
            service=service,
            holder=holder,
            process=me,
            renewed_at=now,
            expires_at=now,
        ).renewed(now, ttl_seconds)
        await log.create(mine.token, mine.render())
        if why_lost(await _highest(log), mine, now=now) is None:
            logger.info("publisher lease %d: %s", mine.token, decision.reason)
            return mine


async def _keep(log: LeaseLog, mine: Lease, ttl_seconds: float, done: asyncio.Event) -> None:
    """Renew until `done`, or until the lease is lost; what is lost shows when it is checked."""
    while True:
        try:
            async with asyncio.timeout(ttl_seconds / RENEWALS_PER_TTL):
                await done.wait()
            return
        except TimeoutError:
            pass
        try:
            latest = await _highest(log)
            if latest is None or latest.nonce != mine.nonce:
                logger.warning("publisher lease %d was taken over", mine.token)
                return
            renewed = mine.renewed(utc_now(), ttl_seconds)
            await log.store.put_bytes(renewed.render(), log.path(mine.token))
        except StoreError as error:
            logger.warning("publisher lease %d could not be renewed: %s", mine.token, error)


async def _give_back(log: LeaseLog, mine: Lease) -> None:
    """Mark it free. The object stays, so that the next token is higher."""
    try:
        latest = await _highest(log)
        if latest is not None and latest.nonce == mine.nonce:
            await log.store.put_bytes(latest.given_back().render(), log.path(mine.token))
    except StoreError as error:
        logger.warning("publisher lease %d was not given back, it expires: %s", mine.token, error)


async def _highest(log: LeaseLog) -> Lease | None:
    """Read the lease with the highest token."""
    entry = await log.last()
    if entry is None:
        return None
    token, data = entry
    return Lease.parse(data, token=token, path=log.path(token))


async def _tidy(log: LeaseLog, token: int, *, may_abort: bool) -> None:
    """Remove the leases below `token`, and what their holders were uploading when they ended."""
    try:
        await log.remove_before(token)
        if may_abort and (count := await log.store.abort_orphaned_uploads()):
            logger.info("%d unfinished uploads of earlier publishers were aborted", count)
    except StoreError as error:
        logger.warning("what earlier publishers left behind was not removed: %s", error)


def this_process() -> Process:
    """Name this process, with what tells it apart on this host where the platform says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Two containers on one machine share its boot, but not their process numbers.
        host = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
        return Process(host=host, pid=os.getpid(), started=_started(os.getpid()))
    except OSError:
        return Process(host=None, pid=os.getpid(), started=None)


def is_running(process: Process) -> bool | None:
    """Say whether a process of this host lives; None where the platform does not show it."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it lives and belongs to somebody else
    try:
        return _started(process.pid) == process.started
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Read when a process started, in clock ticks since boot; None for a zombie."""
    # The name, in parentheses, may hold anything; the state follows it, the start is field 22.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
