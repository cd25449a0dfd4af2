"""What was signalled and served, by whom, when (protocol §7). Field names are our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.loading.disk import Load
from hotload.identity import SnapshotKind


@dataclass(slots=True)
class LedgerEntry:
    """One accepted snapshot."""

    load: Load
    signalled_at: float
    ready_at: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    gate: str = ""
    """What a gate found that let it pass."""

    @property
    def is_coming_adapter(self) -> bool:
        """Whether it is an adapter that no replica has loaded yet."""
        return self.load.kind is SnapshotKind.LORA and not self.ready_at

    def render(self) -> dict[str, Any]:
        """Show the entry as `GET …/ledger` does."""
        replicas = sorted({*self.ready_at, *self.errors})
        return {
            "identity": self.load.identity,
            "kind": self.load.kind.value,
            "previous_snapshot_identity": self.load.previous,
            "signalled_at_seconds": self.signalled_at,
            "replicas": [
                {
                    "replica": name,
                    "ready_at_seconds": self.ready_at.get(name),
                    "error": self.errors.get(name),
                }
                for name in replicas
            ],
            **({"gate": self.gate} if self.gate else {}),
        }


class Ledger:
    """Entries in the order they were signalled, and the adapters that are loaded; `reset` forgets
    them.
    """

    def __init__(self, adapter_slots: int) -> None:
        self._entries: dict[str, LedgerEntry] = {}
        self._slots, self._adapters = adapter_slots, list[Load]()

    def add(self, entry: LedgerEntry) -> None:
        """Record an accepted signal."""
        self._entries[entry.load.identity] = entry

    def get(self, identity: str) -> LedgerEntry | None:
        """Find the entry of an identity."""
        return self._entries.get(identity)

    def serve(self, load: Load) -> None:
        """Note what replicas serve now: an adapter more, or other weights and no adapter."""
        others = [one for one in self._adapters if one != load]
        is_lora = load.kind is SnapshotKind.LORA
        self._adapters = [*others, load][-self._slots :] if is_lora else []

    def unload(self, identity: str) -> None:
        """Note that an adapter is not loaded any more."""
        self._adapters = [one for one in self._adapters if one.identity != identity]

    def reset(self) -> None:
        """Forget every entry."""
        self._entries.clear()
        self._adapters = []

    def render(self) -> list[dict[str, Any]]:
        """Show all entries, newest first."""
        return [entry.render() for entry in reversed(self._entries.values())]

    def chain(self) -> list[Load]:
        """List what a late joiner replays: the last full, the deltas after it, the adapters on top.

        A snapshot that failed wherever it was tried is left out.
        """
        entries = [one for one in self._entries.values() if one.ready_at or not one.errors]
        coming = [one.load for one in entries if one.is_coming_adapter]
        weights = [one.load for one in entries if one.load.kind is not SnapshotKind.LORA]
        return [*lineage(weights), *self._adapters, *coming[-1:]]


def lineage(loads: Sequence[Load]) -> list[Load]:
    """List what leads to the last of the loads, from a full snapshot on; empty where none does."""
    by_identity = {load.identity: load for load in loads}
    chain: list[Load] = []
    wanted = loads[-1].identity if loads else None
    while wanted is not None:
        if (load := by_identity.pop(wanted, None)) is None:
            return []
        chain.append(load)
        wanted = load.previous
    return chain[::-1]
