"""What a fleet is to serve: its ledger, read from the events that lie in the store.

Agents and doors read the same events and come to the same state; neither remembers anything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from agent.fleet.ledger import Ledger, LedgerEntry, lineage
from agent.loading.disk import Load, Transition
from hotload.identity import SnapshotKind, check_identity
from hotload.records import Record, Sha256

REASON_CHARS = 2000
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class FleetEvent(Record):
    """One entry of a fleet's log: a signal, the end of a canary, or a reset of the ledger.

    With `canaries` a signal is for the agents of those names alone, until it is released to all or
    withdrawn.
    """

    event: Literal["signal", "release", "withdraw", "reset"]
    at: AwareDatetime
    identity: str = ""
    kind: SnapshotKind = SnapshotKind.FULL
    previous: Annotated[str, AfterValidator(check_identity)] | None = None
    reset_prompt_cache: str = Field("all", pattern="^(all|none|new_session)$")
    transition: Transition = "ASYNC"
    canaries: tuple[str, ...] = ()
    reason: str = Field("", max_length=REASON_CHARS)
    refuses: tuple[Sha256, ...] = ()
    """Of a withdrawal by a gate's judgement: digests of the content, by which no other snapshot of
    the same bytes is let in."""

    @model_validator(mode="after")
    def _is_about_a_name(self) -> Self:
        """Agents name directories by identities: a path would lead out of their own."""
        if self.event != "reset":
            check_identity(self.identity)
        return self

    @property
    def load(self) -> Load:
        """What an agent has to load."""
        policy = self.reset_prompt_cache
        return Load(self.identity, self.kind, self.previous, policy, self.transition)


@dataclass(slots=True)
class FleetState:
    """Where the events have led: every signal, the last one that stands, and how the last went.

    `began` is when its log begins; `canary` is the signal that waits for its gate, `withdrawn` the
    withdrawal of one that did not pass it and was followed by no other. `refused` has the
    withdrawals by content.
    """

    number: int
    began: datetime | None = None
    ledger: Ledger = field(default_factory=lambda: Ledger(adapter_slots=0))
    canary: FleetEvent | None = None
    withdrawn: FleetEvent | None = None
    refused: dict[str, FleetEvent] = field(default_factory=dict)
    _standing: list[Load] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[FleetEvent], number: int) -> FleetState:
        """Read events in their order; `number` is that of the last."""
        state = cls(number)
        for event in events:
            state.began = state.began or event.at
            state._take(event)
        return state

    def chain_for(self, agent: str) -> list[Load]:
        """List what leads an agent of that name to what it is to serve; empty: base weights. Where
        the way there is not known, its last step alone."""
        waits = self.canary is not None and agent not in self.canary.canaries
        loads = self._standing[:-1] if waits else self._standing
        return lineage(loads) or loads[-1:]

    def chain_to(self, identity: str | None) -> list[Load]:
        """List what leads to a snapshot that was signalled; empty where none of that name was."""
        identities = [load.identity for load in self._standing]
        at = identities.index(identity) + 1 if identity in identities else 0
        return lineage(self._standing[:at])

    def head_for(self, agent: str) -> str | None:
        """Name what an agent is to serve; None is base weights."""
        chain = self.chain_for(agent)
        return chain[-1].identity if chain else None

    def _take(self, event: FleetEvent) -> None:
        is_about_canary = self.canary is not None and self.canary.identity == event.identity
        match event.event:
            case "reset":
                self.ledger.reset()
                self.canary = self.withdrawn = None
                self.refused, self._standing = {}, []
            case "signal":
                self.ledger.add(LedgerEntry(event.load, event.at.timestamp()))
                self._standing.append(event.load)
                self.canary, self.withdrawn = event if event.canaries else None, None
            case "release" if is_about_canary:
                self.canary = None
                if (entry := self.ledger.get(event.identity)) is not None:
                    entry.gate = event.reason
            case "withdraw" if is_about_canary:
                self.withdrawn, self.canary = event, None
                self.refused |= dict.fromkeys(event.refuses, event)
                self._standing.pop()
                if (entry := self.ledger.get(event.identity)) is not None:
                    entry.errors["canary"] = event.reason
