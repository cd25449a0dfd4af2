"""Who has which groups of a rollout: one log per part, so that one consumer uses each group.

    <rollout directory>/claims/<part>-<12 hex of its sha256>/000000.json, 000001.json, …

An entry is created only if absent, so a log has one order that everybody sees. A consumer leases a
part, acknowledges groups of it, and may give it back. An acknowledgement counts only while the
last lease before it is the consumer's own: the place after the log's last entry is created once, so
a consumer that was taken over cannot acknowledge any more, whatever the clocks say. Clocks decide
only when a lease has expired: one that is ahead takes over early, and then the slower consumer's
acknowledgement is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime, Field

from hotload.dataset.logprob_drift import LogprobDrift
from hotload.dataset.rollout_plan import RolloutPart
from hotload.errors import StoreError
from hotload.records import Record

CLAIMS = "claims"
CLAIM_LIMIT_BYTES = 16 << 20
CONSUMER_LIMIT_CHARACTERS = 256
NUMBER_DIGITS = 6
DRIFT_LIMIT = 1e12
"""Bounds every count and figure of a stored drift; no measured one comes near it."""


class Claim(Record):
    """An entry of a part's log; `nonce` tells one consumer's process from every other."""

    kind: Literal["lease", "acknowledge", "give back"]
    consumer: str = Field(max_length=CONSUMER_LIMIT_CHARACTERS)
    nonce: str = Field(min_length=16, max_length=64)
    at: AwareDatetime
    expires_at: AwareDatetime | None = None
    problem_ids: tuple[str, ...] = ()
    drift: LogprobDrift | None = None
    """Of an acknowledgement: what the trainer measured on these problems' samples."""

    def render(self) -> bytes:
        """Write it as stored; `parse` reads it back."""
        # Without what is not there: readers of before there was a drift refuse the field.
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Claim:
        """Read the entry in `data`.

        Raises:
            StoreError: not a claim; who has the part's groups is then unknown.
        """
        claim = cls.parse_stored(data, path)
        if (claim.kind == "lease") != (claim.expires_at is not None):
            raise StoreError(path, "not a claim: a lease, and only a lease, expires")
        if claim.drift is not None:
            if claim.kind != "acknowledge":
                raise StoreError(path, "not a claim: only an acknowledgement has a drift")
            figures = claim.drift.model_dump(exclude_none=True)
            if max(map(abs, figures.values())) > DRIFT_LIMIT:
                raise StoreError(path, f"not a claim: drift: a number beyond {DRIFT_LIMIT:g}")
        return claim


def claims_path(directory: str, part: RolloutPart) -> str:
    """Name the place of a part's log; a part with other content has another one."""
    return f"{directory}/{CLAIMS}/{part.file.partition('.')[0]}-{part.sha256[:12]}"


@dataclass(frozen=True, slots=True)
class Holding:
    """Sums up a part's log: who has the part, and which of its groups are used."""

    lease: Claim | None
    """The last lease, unless it was given back; it may have expired."""
    acknowledged: Mapping[str, str]
    """Problems whose groups are used for good, each with the nonce of the consumer that did."""
    drifts: tuple[LogprobDrift, ...] = ()
    """Of the acknowledgements that count and have one."""

    @classmethod
    def of(cls, log: Sequence[Claim]) -> Holding:
        """Fold the entries of a log, oldest first."""
        lease: Claim | None = None
        acknowledged: dict[str, str] = {}
        drifts: list[LogprobDrift] = []
        for claim in log:
            if claim.kind == "lease":
                lease = claim
            elif lease is not None and claim.nonce == lease.nonce:
                for problem_id in claim.problem_ids:
                    acknowledged.setdefault(problem_id, claim.nonce)
                drifts += [claim.drift] if claim.drift is not None else []
                lease = None if claim.kind == "give back" else lease
        return cls(lease, acknowledged, tuple(drifts))

    def is_held_by(self, nonce: str) -> bool:
        """Say whether the consumer with this nonce may acknowledge, expired or not."""
        return self.lease is not None and self.lease.nonce == nonce

    def is_busy(self, nonce: str, now: datetime) -> bool:
        """Say whether another consumer has it and its time is not up."""
        lease = self.lease
        return (
            lease is not None
            and lease.nonce != nonce
            and lease.expires_at is not None
            and now < lease.expires_at
        )

    def needs_renewal(self, nonce: str, now: datetime) -> bool:
        """Say whether the consumer with this nonce has no lease, or less than half of it left."""
        lease = self.lease
        if lease is None or lease.nonce != nonce or lease.expires_at is None:
            return True
        return now - lease.at > (lease.expires_at - lease.at) / 2
