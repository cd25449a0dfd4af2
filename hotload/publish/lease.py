"""The publisher's lease: at most one cycle publishes to a service, whoever holds the highest token.

A lease is an object `_hotload/leases/<account>/<service>/<token:010d>.json` in the store, created
only if absent. Its creator is the publisher to that service until it gives the lease back, stops
renewing it, or a higher token appears. This module decides;
`hotload.clients.store.publisher_leases` acts.

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

from pydantic import AwareDatetime, Field

from hotload.errors import StoreError
from hotload.records import Record

LEASES = "_hotload/leases"
RETENTION = "retention"
"""Holds a lease of its own under this name while snapshots are removed, beside those of all
services; neither a service nor a cycle is called so."""
LEASE_LIMIT_BYTES = 16_384
TOKEN_DIGITS = 10
TTL_SECONDS = 60.0
RENEWALS_PER_TTL = 4


class Process(Record):
    """Names a process so that no other is mistaken for it: where it runs, its number, its start.

    `host` names the machine, its boot and its process namespace; None where the platform does not
    tell, and then no other process can say whether it lives.
    """

    host: str | None = Field(max_length=512)
    pid: int
    started: str | None = Field(max_length=64)


class Lease(Record):
    """Names who publishes, and until when unless renewed.

    `nonce` tells two writers of one token apart. `service` is empty in a lease of an earlier
    version of hotload, which had one for all services of a store.
    """

    token: int = Field(ge=1, lt=10**TOKEN_DIGITS)
    nonce: str = Field(min_length=16, max_length=64)
    service: str = Field("", max_length=512)
    holder: str = Field(max_length=256)
    process: Process
    renewed_at: AwareDatetime
    expires_at: AwareDatetime
    released: bool = False

    def renewed(self, now: datetime, ttl_seconds: float) -> Lease:
        """Return the same lease, held for `ttl_seconds` from `now` on."""
        until = now + timedelta(seconds=ttl_seconds)
        return self.model_copy(update={"renewed_at": now, "expires_at": until})

    def given_back(self) -> Lease:
        """Return the same lease, free for the next publisher; it stays so that tokens only grow."""
        return self.model_copy(update={"released": True})

    def render(self) -> bytes:
        """Write it as stored; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, *, token: int, path: str) -> Lease:
        """Read the lease in `data`, which lies at `path` and must be that of `token`.

        Raises:
            StoreError: not a lease, or that of another token. Who holds the service is then
            unknown.
        """
        try:
            lease = cls.parse_stored(data, path)
        except StoreError as error:
            reason = f"{error.reason}; delete it when no cycle is running"
            raise StoreError(path, reason) from None
        if lease.token != token:
            raise StoreError(path, f"names token {lease.token}; delete it when no cycle is running")
        return lease


@dataclass(frozen=True, slots=True)
class Decision:
    """Says whether a publisher may take the lease now, and why; else it has to wait."""

    may_take: bool
    reason: str


def decide(
    latest: Lease | None, *, now: datetime, me: Process, cycle: str, is_running: bool | None
) -> Decision:
    """Decide whether the service is free, or held and to be waited for.

    Args:
        latest: the lease with the highest token, None if there never was one.
        now: this host's clock.
        me: the process that asks.
        cycle: for which it asks, as a holder is named.
        is_running: whether the holder's process lives, as far as this host can see; None if it
            cannot. Believed only if the holder runs on this very host.
    """
    if latest is None:
        return Decision(True, "there was no holder before")
    if latest.released:
        return Decision(True, f"{latest.holder!r} gave it back")
    same_host = me.host is not None and latest.process.host == me.host
    if same_host and is_running is False:
        reason = (
            f"{latest.holder!r} is gone: process {latest.process.pid} ended without giving it back"
        )
        return Decision(True, reason)
    if now >= latest.expires_at:
        late = (now - latest.expires_at).total_seconds()
        return Decision(True, f"{latest.holder!r} let it expire {late:.0f} s ago")
    left = (latest.expires_at - now).total_seconds()
    who = f"process {latest.process.pid}" + ("" if same_host else " on another host")
    if latest.holder == cycle:
        who = f"another run of this cycle, {who},"
    until = f"for {left:.0f} s more unless it renews it; start again after that"
    return Decision(False, f"{who} holds it {until}")


def why_lost(latest: Lease | None, mine: Lease, *, now: datetime) -> str | None:
    """Say why `mine` no longer allows a signal, given the lease with the highest token; None if it
    does."""
    if latest is None:
        return "its object was removed from the store"
    if latest.token > mine.token:
        who = f"token {latest.token}"
        if latest.holder == mine.holder:
            who = f"another run of this cycle, {who},"
        return f"{who} has taken over from token {mine.token}"
    if latest.token < mine.token or latest.nonce != mine.nonce:
        return f"its object, token {mine.token}, was replaced"
    if latest.released:
        return "this cycle gave it back"
    if now >= latest.expires_at:
        return (
            f"this cycle's own, token {mine.token}, ran out at {latest.expires_at:%H:%M:%S} UTC and"
            " was not renewed; nobody has taken it: start the cycle again, it goes on"
        )
    return None
