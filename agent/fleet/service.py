"""What the API needs of a service, whether its replicas are in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent.fleet.settings import FleetConfig


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """How many replicas there are to be, are listed, and are ready."""

    expected: int
    listed: int
    ready: int


class Fleet(Protocol):
    """A service with its replicas (protocol §4-§8)."""

    @property
    def config(self) -> FleetConfig:
        """Its names, and how it swaps."""

    @property
    def context_length(self) -> int | None:
        """Tokens that fit its model; None where nobody says."""

    async def signal(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out operation A: check, record, let every replica load.

        Raises:
            RefusedError: the documented refusals.
        """

    async def observe(self) -> dict[str, Any]:
        """Make the body of operation B."""

    async def hint(self, body: Mapping[str, Any]) -> None:
        """Carry out operation C.

        Raises:
            RefusedError: hints are not taken.
        """

    async def forget(self) -> None:
        """Carry out operation D: forget every snapshot."""

    async def entries(self) -> list[dict[str, Any]]:
        """Show the ledger, newest first."""

    async def count(self) -> ReplicaCounts:
        """Count the replicas."""
