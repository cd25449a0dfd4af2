"""A canary: some replicas first, then a gate, then the rest, or back.

A gate is a function, `package.module:function` of the user's or the one by samples
(`agent.door.sample_gate`), plain or async. It is called once every canary is ready, with a
`CanarySnapshot`, and returns whether the rest may follow: a truth value, or a `GateVerdict`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from threading import Thread
from typing import Any

from agent.door.gate_verdict import GateVerdict
from agent.door.seen import SeenAgent
from agent.fleet.state import FleetEvent
from hotload.clients.redaction import redact
from hotload.sampling.reward.user_errors import (
    describe_exception,
    replace_surrogates,
    secret_values,
)

VERDICT_CHARS = 900


@dataclass(frozen=True, slots=True)
class CanarySnapshot:
    """What a gate judges: a snapshot, the one before it, and the agents that serve it."""

    identity: str
    previous: str | None
    agents: tuple[str, ...]
    """Their addresses."""
    servers: tuple[str, ...] = ()
    """Where clients ask those agents' engines."""
    served_before: str | None = None
    """What the other agents serve; None is base weights."""
    other_servers: tuple[str, ...] = ()
    """Where clients ask the engines of those others that are ready with it."""


@dataclass(frozen=True, slots=True)
class CanaryRule:
    """How many replicas go first, what lets the others follow, and how long they and it may take.

    `judges_again` lets in what was refused before by its bytes.
    """

    fraction: float
    gate: Callable[[CanarySnapshot], Any] | None = None
    timeout_seconds: float = 600.0
    judges_again: bool = False

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

    @property
    def keeps_judgements(self) -> bool:
        """Whether bytes that a gate refused stay refused."""
        return self.gate is not None and not self.judges_again


async def judge(
    rule: CanaryRule,
    event: FleetEvent,
    agents: Sequence[SeenAgent],
    served_before: str | None,
    waited_seconds: float,
) -> GateVerdict | None:
    """Say whether a canary is released, and why; None while its replicas are on their way."""
    canaries = [one for one in agents if one.is_believed and one.report.name in event.canaries]
    for one in canaries:
        if one.report.stage == "error" and one.report.target == event.identity:
            return GateVerdict(False, f"{one.report.name}: {one.report.error}", False)
    on_it = [one for one in canaries if one.is_on(event.identity)]
    if len(on_it) < len(event.canaries):
        if waited_seconds < rule.timeout_seconds:
            return None
        found = f"{len(on_it)} of {len(event.canaries)} canaries were ready in time"
        return GateVerdict(False, found, False)
    if rule.gate is None:
        return GateVerdict(True, "")
    others = [one for one in agents if one.report.name not in event.canaries]
    snapshot = CanarySnapshot(
        event.identity,
        event.previous,
        tuple(one.url for one in on_it),
        tuple(one.report.serves for one in on_it),
        served_before,
        tuple(one.report.serves for one in others if one.is_on(served_before)),
    )
    try:
        async with asyncio.timeout(rule.timeout_seconds) as limit:
            return _verdict_of(await _ask(rule.gate, snapshot))
    # Whatever a user's function raises lets nothing through; a SystemExit would end the door.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        why = describe_exception(error, secret_values(os.environ))
        if isinstance(error, TimeoutError) and limit.expired():
            why = f"no verdict within {rule.timeout_seconds:g} s"
        return GateVerdict(False, f"the gate failed: {replace_surrogates(why)}", False)


def _verdict_of(said: Any) -> GateVerdict:
    if isinstance(said, GateVerdict):
        return said
    if said is True:
        return GateVerdict(True, "the gate said True")
    return GateVerdict(False, f"the gate said {_shown(said)}", is_about_bytes=said is False)


def _shown(said: object) -> str:
    """Show what a gate returned, without secrets; its text is a user's code, and may raise."""
    return replace_surrogates(redact(repr(said), secret_values(os.environ))[:VERDICT_CHARS])


async def _ask(gate: Callable[[CanarySnapshot], Any], snapshot: CanarySnapshot) -> Any:
    """Call a gate in a thread of its own, which is left behind where it never ends."""
    answer: Future[Any] = Future()

    def call() -> None:
        with suppress(InvalidStateError):  # given up meanwhile
            try:
                answer.set_result(gate(snapshot))
            except BaseException as error:  # noqa: BLE001 - the caller's to judge
                answer.set_exception(error)

    Thread(target=call, name="gate", daemon=True).start()
    verdict = await asyncio.wrap_future(answer)
    return await verdict if inspect.isawaitable(verdict) else verdict
