"""A canary: some replicas first, then a gate, then the rest, or back.

The gate is a function of the user's, `package.module:function`, plain or async. It is called once
every canary is ready, with a `CanarySnapshot`, and returns whether the rest may follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from agent.door.seen import SeenAgent
from agent.fleet.state import FleetEvent


@dataclass(frozen=True, slots=True)
class CanarySnapshot:
    """What a gate judges: a snapshot, the one before it, and the agents that serve it."""

    identity: str
    previous: str | None
    agents: tuple[str, ...]
    """Their addresses."""


@dataclass(frozen=True, slots=True)
class CanaryRule:
    """How many replicas go first, what lets the others follow, and how long that may take."""

    fraction: float
    gate: Callable[[CanarySnapshot], Any] | None = None
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Check the fraction.

        Raises:
            ValueError: it is not one.
        """
        if not 0 < self.fraction < 1:
            raise ValueError(f"canary: expected more than 0 and less than 1, not {self.fraction}")

    def choose(self, agents: Sequence[SeenAgent]) -> tuple[str, ...]:
        """Name the agents that go first, at least one; none where that would be all."""
        names = sorted(one.report.name for one in agents)
        chosen = tuple(names[: ceil(self.fraction * len(names) - 1e-9)])
        return chosen if len(chosen) < len(names) else ()


async def judge(
    rule: CanaryRule, event: FleetEvent, agents: Sequence[SeenAgent], waited_seconds: float
) -> tuple[bool, str] | None:
    """Say whether a canary is released, and why not; None while its replicas are on their way."""
    canaries = [one for one in agents if one.is_believed and one.report.name in event.canaries]
    for one in canaries:
        if one.report.stage == "error" and one.report.target == event.identity:
            return False, f"{one.report.name}: {one.report.error}"
    ready = [one for one in canaries if one.report.readiness]
    on_it = [one for one in ready if one.report.current == event.identity]
    if len(on_it) < len(event.canaries):
        if waited_seconds < rule.timeout_seconds:
            return None
        return False, f"{len(on_it)} of {len(event.canaries)} canaries were ready in time"
    if rule.gate is None:
        return True, ""
    snapshot = CanarySnapshot(event.identity, event.previous, tuple(one.url for one in on_it))
    try:
        verdict = rule.gate(snapshot)
        if inspect.isawaitable(verdict):
            verdict = await verdict
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises lets nothing through
        return False, f"the gate failed: {type(error).__name__}: {error}"[:1000]
    return verdict is True, "" if verdict is True else f"the gate said {verdict!r}"[:1000]
