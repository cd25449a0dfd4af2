"""Lease: hold the right to publish to a service for as long as a cycle runs (see
hotload/publish/lease.py)."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.checkpoint_store import CheckpointStore
from hotload.errors import LeaseLostError, StoreError, StoreUnavailableError
from hotload.publish.lease import (
    LEASE_LIMIT_BYTES,
    LEASES,
    Claim,
    Lease,
    Process,
    decide,
    highest_token,
    lease_path,
    loss,
    token_of,
)

TTL_SECONDS = 60.0
RENEWALS_PER_TTL = 4
TAKE_DELAYS_SECONDS = (2.0, 4.0, 8.0)

logger = logging.getLogger(__name__)
# What this process holds: the nonce behind a token never leaves it.
_HELD: dict[tuple[str, int], Lease] = {}


@dataclass(frozen=True)
class PublisherLease:
    """A lease that is held; `token` travels to the step that signals."""

    token: int


@asynccontextmanager
async def publisher_lease(
    store: CheckpointStore,
    holder: str,
    *,
    ttl_seconds: float = TTL_SECONDS,
) -> AsyncIterator[PublisherLease]:
    """Hold the service behind `store` for `holder`, a name a person recognises.

    Renewed four times per `ttl_seconds` in the background, given back at the end. A publisher on
    this host that was killed is taken over at once, any other when its lease has expired. Uploads
    that earlier publishers left unfinished are aborted: nobody else may upload here now.

    Raises:
        LeaseLostError: another publisher holds it.
        StoreError: the store cannot be read or written.
    """
    mine = await _acquire(store, holder, ttl_seconds)
    _HELD[store.url, mine.token] = mine
    done = asyncio.Event()
    renewing = asyncio.create_task(_keep(store, mine, ttl_seconds, done))
    try:
        # Only now, while it is renewed: tidying can take longer than the lease lasts.
        await _tidy(store, mine.token)
        yield PublisherLease(mine.token)
    finally:
        # Never cancelled: a renewal under way could arrive after the lease was given back.
        done.set()
        await renewing
        del _HELD[store.url, mine.token]
        await _give_back(store, mine)


async def check_lease(store: CheckpointStore, token: int) -> None:
    """Return if this process still may signal. Asked right before a signal, every time.

    Raises:
        LeaseLostError: another publisher took over, or the lease expired unrenewed.
        StoreError: the store cannot be read; whether the lease is held is unknown.
    """
    mine = _HELD.get((store.url, token))
    if mine is None:
        raise LeaseLostError("nobody", f"this process does not hold token {token}")
    found = await _highest(store)
    reason = loss(found, mine, now=datetime.now(UTC))
    if reason is not None:
        raise LeaseLostError(found.holder if found else "nobody", reason)


async def _acquire(store: CheckpointStore, holder: str, ttl_seconds: float) -> Lease:
    """Take the lease. No engine repeats this step, so an unavailable store is asked again here."""
    nonce = secrets.token_hex(16)
    for delay in TAKE_DELAYS_SECONDS:
        try:
            return await _take(store, holder, ttl_seconds, nonce)
        except StoreUnavailableError as error:
            logger.warning("the publisher lease is asked for again in %.0f s: %s", delay, error)
            await asyncio.sleep(delay)
    return await _take(store, holder, ttl_seconds, nonce)


async def _take(store: CheckpointStore, holder: str, ttl_seconds: float, nonce: str) -> Lease:
    me = this_process()
    while True:
        found = await _highest(store)
        now = datetime.now(UTC)
        if found is not None and found.nonce == nonce:
            return found  # made by an attempt whose answer was lost
        running = is_running(found.process) if found else None
        decision = decide(found, now=now, me=me, is_running=running)
        if found is not None and decision.claim is Claim.WAIT:
            raise LeaseLostError(found.holder, decision.reason)
        mine = Lease(
            token=found.token + 1 if found else 1,
            nonce=nonce,
            holder=holder,
            process=me,
            renewed_at=now,
            expires_at=now,
        ).renewed(now, ttl_seconds)
        # What it returns does not matter: an answer can be lost on the way. What is stored decides.
        await store.create_bytes(mine.render(), mine.path)
        if loss(await _highest(store), mine, now=now) is None:
            logger.info("publisher lease %d: %s", mine.token, decision.reason)
            return mine


async def _keep(
    store: CheckpointStore, mine: Lease, ttl_seconds: float, done: asyncio.Event
) -> None:
    """Renew until `done`, or until the lease is lost; what is lost shows when it is checked."""
    while True:
        try:
            async with asyncio.timeout(ttl_seconds / RENEWALS_PER_TTL):
                await done.wait()
            return
        except TimeoutError:
            pass
        try:
            found = await _highest(store)
            if found is None or found.nonce != mine.nonce:
                logger.warning("publisher lease %d was taken over", mine.token)
                return
            renewed = mine.renewed(datetime.now(UTC), ttl_seconds)
            await store.put_bytes(renewed.render(), mine.path)
        except StoreError as error:
            logger.warning("publisher lease %d could not be renewed: %s", mine.token, error)


async def _give_back(store: CheckpointStore, mine: Lease) -> None:
    """Mark it free. The object stays, so that the next token is higher."""
    try:
        found = await _highest(store)
        if found is not None and found.nonce == mine.nonce:
            await store.put_bytes(found.given_back().render(), mine.path)
    except StoreError as error:
        logger.warning("publisher lease %d was not given back, it expires: %s", mine.token, error)


async def _highest(store: CheckpointStore) -> Lease | None:
    """The lease with the highest token."""
    while token := highest_token(await store.names(LEASES)):
        path = lease_path(token)
        try:
            data = await store.read_bytes(path, limit_bytes=LEASE_LIMIT_BYTES)
            return Lease.parse(data, token=token)
        except StoreUnavailableError:
            raise
        except StoreError:
            # Removed since it was listed, by one who holds a higher token: look again.
            if await store.size(path) is not None:
                raise
    return None


async def _tidy(store: CheckpointStore, token: int) -> None:
    """Remove the leases below `token`, and what their holders were uploading when they ended."""
    try:
        for name in await store.names(LEASES):
            old = token_of(name)
            if old is not None and old < token:
                await store.delete_file(lease_path(old))
        if count := await store.abort_orphaned_uploads():
            logger.info("%d unfinished uploads of earlier publishers were aborted", count)
    except StoreError as error:
        logger.warning("what earlier publishers left behind was not removed: %s", error)


def this_process() -> Process:
    """This process, with what tells it apart on this host where the platform says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Two containers on one machine share its boot, but not their process numbers.
        host = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
        return Process(host=host, pid=os.getpid(), started=_started(os.getpid()))
    except OSError:
        return Process(host=None, pid=os.getpid(), started=None)


def is_running(process: Process) -> bool | None:
    """Whether a process of this host lives; None where that cannot be told."""
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
    """When a process started, in clock ticks since boot; None for one that has ended (a zombie)."""
    # The name, in parentheses, may hold anything; the state follows it, the start is field 22.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
