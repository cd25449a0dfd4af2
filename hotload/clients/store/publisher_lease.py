"""The publisher's lease: hold the right to publish to a service for as long as a cycle runs.

`hotload.publish.lease` decides; this module reads and writes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from hotload.clients.store.lease_log import LeaseLog
from hotload.clients.store.store import Store
from hotload.errors import LeaseLostError, StoreError, StoreUnavailableError
from hotload.publish.lease import (
    LEASE_LIMIT_BYTES,
    LEASES,
    TOKEN_DIGITS,
    Lease,
    Process,
    decide,
    loss,
)

TTL_SECONDS = 60.0
RENEWALS_PER_TTL = 4
TAKE_DELAYS_SECONDS = (2.0, 4.0, 8.0)

logger = logging.getLogger(__name__)


def lease_log(store: Store) -> LeaseLog:
    """Name the log of a service's publishers; an entry's number is its lease's token."""
    return LeaseLog(store, LEASES, first=1, digits=TOKEN_DIGITS, limit_bytes=LEASE_LIMIT_BYTES)


@asynccontextmanager
async def publisher_lease(
    store: Store,
    holder: str,
    *,
    ttl_seconds: float = TTL_SECONDS,
) -> AsyncIterator[Lease]:
    """Hold the service behind `store` for `holder`, a name a person recognises.

    Yields the lease as it was taken; with it, `check_lease` tells whether it still is held.
    Renewed four times per `ttl_seconds` in the background, given back at the end. A publisher on
    this host that was killed is taken over at once, any other when its lease has expired. Uploads
    that earlier publishers left unfinished are aborted: no other publisher may upload here now.

    Raises:
        LeaseLostError: another publisher holds it.
        StoreError: the store cannot be read or written.
    """
    log = lease_log(store)
    mine = await _acquire(log, holder, ttl_seconds)
    done = asyncio.Event()
    renewing = asyncio.create_task(_keep(log, mine, ttl_seconds, done))
    try:
        # Only now, while it is renewed: tidying can take longer than the lease lasts.
        await _tidy(log, mine.token)
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
    latest = await _highest(lease_log(store))
    reason = loss(latest, mine, now=datetime.now(UTC))
    if reason is not None:
        raise LeaseLostError(latest.holder if latest else None, reason)


async def _acquire(log: LeaseLog, holder: str, ttl_seconds: float) -> Lease:
    """Take the lease. No engine repeats this step, so an unavailable store is asked again here."""
    nonce = secrets.token_hex(16)
    for delay in TAKE_DELAYS_SECONDS:
        try:
            return await _take(log, holder, ttl_seconds, nonce)
        except StoreUnavailableError as error:
            logger.warning("the publisher lease is asked for again in %.0f s: %s", delay, error)
            await asyncio.sleep(delay)
    return await _take(log, holder, ttl_seconds, nonce)


async def _take(log: LeaseLog, holder: str, ttl_seconds: float, nonce: str) -> Lease:
    me = this_process()
    while True:
        latest = await _highest(log)
        now = datetime.now(UTC)
        if latest is not None and latest.nonce == nonce:
            return latest  # made by an attempt whose answer was lost
        running = is_running(latest.process) if latest else None
        decision = decide(latest, now=now, me=me, is_running=running)
        if latest is not None and not decision.may_take:
            raise LeaseLostError(latest.holder, decision.reason)
        mine = Lease(
            token=latest.token + 1 if latest else 1,
            nonce=nonce,
            holder=holder,
            process=me,
            renewed_at=now,
            expires_at=now,
        ).renewed(now, ttl_seconds)
        await log.create(mine.token, mine.render())
        if loss(await _highest(log), mine, now=now) is None:
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
            renewed = mine.renewed(datetime.now(UTC), ttl_seconds)
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


async def _tidy(log: LeaseLog, token: int) -> None:
    """Remove the leases below `token`, and what their holders were uploading when they ended."""
    try:
        await log.remove_before(token)
        if count := await log.store.abort_orphaned_uploads():
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
