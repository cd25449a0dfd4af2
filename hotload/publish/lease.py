"""The publisher's lease: at most one cycle publishes to a service, whoever holds the highest token.

A lease is an object `_hotload/leases/<token:010d>.json` in the store, created only if absent. Its
creator is the publisher until it gives the lease back, stops renewing it, or a higher token
appears. This module decides; `tasks/lease.py` acts.

What is guaranteed, given a store with conditional puts: a token has one creator; tokens only grow;
a publisher that was taken over, however long it was paused, learns so when it checks, and it checks
last of all before a signal. What is not: a pause between that check and the signal's arrival can
let both signal. The service then refuses a delta that does not follow what it serves, and no
identity is made twice, so the loser's cycle fails and no replica gets wrong weights.

Clocks are compared between hosts: a clock that is ahead by `s` takes over a holder up to `s`
seconds before its time. That costs the holder its cycle and nothing else, for the reason above. A
holder on the same host is judged by its process first, so a killed cycle can be started again at
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import AwareDatetime, Field

from hotload.errors import StoreError
from hotload.records import Record

LEASES = "_hotload/leases"
LEASE_LIMIT_BYTES = 16_384
TOKEN_DIGITS = 10


def lease_path(token: int) -> str:
    """Where the lease of `token` lies in the store."""
    return f"{LEASES}/{token:0{TOKEN_DIGITS}d}.json"


class Process(Record):
    """A process that cannot be mistaken for another one: where it runs, its number, its start.

    `host` names the machine, its boot and its process namespace; None where the platform does not
    tell, and then nobody can say from outside whether the process lives.
    """

    host: str | None = Field(max_length=512)
    pid: int
    started: str | None = Field(max_length=64)


class Lease(Record):
    """Who publishes, and until when unless renewed. `nonce` tells two claims of one token apart."""

    token: int = Field(ge=1, lt=10**TOKEN_DIGITS)
    nonce: str = Field(min_length=16, max_length=64)
    holder: str = Field(max_length=256)
    process: Process
    renewed_at: AwareDatetime
    expires_at: AwareDatetime
    released: bool = False

    @property
    def path(self) -> str:
        """Where it lies in the store."""
        return lease_path(self.token)

    def renewed(self, now: datetime, ttl_seconds: float) -> Lease:
        """The same lease, held for `ttl_seconds` from `now` on."""
        until = now + timedelta(seconds=ttl_seconds)
        return self.model_copy(update={"renewed_at": now, "expires_at": until})

    def given_back(self) -> Lease:
        """The same lease, free for the next publisher; it stays so that tokens only grow."""
        return self.model_copy(update={"released": True})

    def render(self) -> bytes:
        """As stored; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, *, token: int) -> Lease:
        """The lease in `data`, which must be that of `token`.

        Raises:
            StoreError: not a lease, or that of another token. Who holds the service is then
            unknown.
        """
        where = lease_path(token)
        try:
            lease = cls.parse_stored(data, where)
        except StoreError as error:
            reason = f"{error.reason}; delete it when no cycle is running"
            raise StoreError(where, reason) from None
        if lease.token != token:
            raise StoreError(
                where, f"names token {lease.token}; delete it when no cycle is running"
            )
        return lease


def highest_token(names: list[str]) -> int:
    """The highest token among the names of stored leases; 0 without one. Other names are
    ignored."""
    return max((token for token in map(token_of, names) if token), default=0)


def token_of(name: str) -> int | None:
    """The token a stored lease's file name stands for; None for any other name."""
    stem, dot, suffix = name.partition(".")
    is_token = len(stem) == TOKEN_DIGITS and stem.isascii() and stem.isdigit() and int(stem) > 0
    return int(stem) if is_token and dot + suffix == ".json" else None


class Claim(StrEnum):
    """What a publisher may do about the lease it found."""

    TAKE = "take"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Decision:
    """A claim with the sentence that explains it."""

    claim: Claim
    reason: str


def decide(found: Lease | None, *, now: datetime, me: Process, is_running: bool | None) -> Decision:
    """Whether the service is free, or held and to be waited for.

    Args:
        found: the lease with the highest token, None if there never was one.
        now: this host's clock.
        me: the process that asks.
        is_running: whether the holder's process lives, as far as this host can see; None if it
            cannot. Believed only if the holder runs on this very host.
    """
    if found is None:
        return Decision(Claim.TAKE, "nobody held it before")
    if found.released:
        return Decision(Claim.TAKE, f"{found.holder!r} gave it back")
    same_host = me.host is not None and found.process.host == me.host
    if same_host and is_running is False:
        reason = (
            f"{found.holder!r} is gone: process {found.process.pid} ended without giving it back"
        )
        return Decision(Claim.TAKE, reason)
    if now >= found.expires_at:
        late = (now - found.expires_at).total_seconds()
        return Decision(Claim.TAKE, f"{found.holder!r} let it expire {late:.0f} s ago")
    left = (found.expires_at - now).total_seconds()
    where = f"process {found.process.pid}" + ("" if same_host else " on another host")
    return Decision(Claim.WAIT, f"{where} holds it for {left:.0f} s more unless it renews it")


def loss(found: Lease | None, mine: Lease, *, now: datetime) -> str | None:
    """Why `mine` no longer allows a signal, given the lease with the highest token; None if it
    does."""
    if found is None:
        return "its object was removed from the store"
    if found.token > mine.token:
        return f"token {found.token} has taken over from token {mine.token}"
    if found.token < mine.token or found.nonce != mine.nonce:
        return f"its object, token {mine.token}, was replaced"
    if found.released:
        return "it was given back"
    if now >= found.expires_at:
        return f"it expired at {found.expires_at:%H:%M:%S} and was not renewed"
    return None
