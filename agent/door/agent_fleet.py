"""A service whose replicas are agents elsewhere: signals go to the log, status is what they say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from agent.door.canary import CanaryRule, judge
from agent.door.seen import UNKNOWN, SeenAgent, ask_all, doubt, nudge
from agent.failures import RefusedError
from agent.fleet.addresses import Addresses
from agent.fleet.admission import Member, chain_obstacle, inspect_snapshot, is_repeated
from agent.fleet.log import FleetLog
from agent.fleet.service import ReplicaCounts
from agent.fleet.settings import FleetConfig
from agent.fleet.signals import Signal
from agent.fleet.state import REASON_CHARS, FleetEvent, FleetState
from agent.fleet.validation import BaseModel, InvalidSnapshotError
from agent.loading.bucket import BucketError, MissingObjectError, SnapshotBucket
from hotload.clients.store.records import read_snapshot_manifest
from hotload.clients.store.store import Store
from hotload.clock import utc_now
from hotload.errors import StoreError, StoreUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.readiness import SETTLED_STAGES

TURNS = 5  # a signal that another door's came before is looked at again so often

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DoorConfig(FleetConfig):
    """A door's agents, how many of them a signal needs, and what is tried on a few first."""

    addresses: Addresses
    quorum: float = 1.0
    canary: CanaryRule | None = None
    base_model: BaseModel | None = None


class AgentFleet:
    """A service over agents. Two doors of one service agree, since both have but the log."""

    context_length: int | None = None

    def __init__(self, config: DoorConfig, store: Store) -> None:
        self.config = config
        self._store, self._bucket = store, SnapshotBucket(store.url, store.options)
        self._log = FleetLog(store, config.account_id, config.deployment_id)
        self._contents: dict[str, str | None] = {}
        self._signalling = asyncio.Lock()

    async def look(self) -> tuple[FleetState, list[SeenAgent]]:
        """Ask every agent and read the log.

        Raises:
            RefusedError: 503, the store does not answer.
        """
        try:
            # In this order: what an agent serves was in the log before it served it.
            seen = await ask_all(await self.config.addresses.all())
            state = await self._log.read()
            for identity in {one.report.current for one in seen} - {None, *self._contents}:
                if identity is not None and state.ledger.get(identity):
                    await self._learn(identity)
        except StoreError as error:
            raise RefusedError(503, f"the store: {error}") from None
        return state, doubt(seen, state, self._contents, utc_now())

    async def _learn(self, identity: str) -> None:
        try:
            manifest = await read_snapshot_manifest(self._store, identity)
        except StoreUnavailableError:
            raise
        except StoreError as error:  # held to its neighbours, as without one
            logger.warning("%s: %s", identity, error)
            return
        self._contents[identity] = manifest.content.sha256 if manifest else None

    def remark(self, state: FleetState) -> str:
        """Say what a person should know of the log; empty where there is nothing."""
        return self._log.remark(state)

    async def signal(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out operation A: check, write it into the log, let the agents look.

        Raises:
            RefusedError: the documented refusals; 503 while too few agents answer.
        """
        signal = Signal.parse(body, knows_prompt_cache=True)
        async with self._signalling:
            for _ in range(TURNS):
                if await self._accept(signal):
                    break
            else:
                raise _overtaken()
        await nudge(await self.config.addresses.all())
        return {"identity": signal.identity}

    async def observe(self) -> dict[str, Any]:
        """Carry out operation B. An agent that is to load something and does not yet say so is
        shown as about to; a snapshot that was withdrawn as one that failed."""
        state, seen = await self.look()
        return {"replicas": [self._shown(one, state) for one in seen]}

    async def hint(self, body: Mapping[str, Any]) -> None:
        """Refuse operation C: agents fetch what is signalled."""
        raise RefusedError(404, "hints are not taken here")

    async def forget(self) -> None:
        """Carry out operation D: every agent goes to the base model, where it knows one.

        Raises:
            RefusedError: 503, the store does not answer.
        """
        for _ in range(TURNS):
            state, _ = await self.look()
            if await self._write(FleetEvent(event="reset", at=utc_now()), state):
                break
        else:
            raise _overtaken()
        await nudge(await self.config.addresses.all())

    async def entries(self) -> list[dict[str, Any]]:
        """Carry out operation E: what was signalled, with the errors that agents show."""
        state, seen = await self.look()
        for one in seen:
            entry = state.ledger.get(one.report.target or "")
            if entry is not None and one.report.stage == "error":
                entry.errors[one.report.name] = one.report.error
        return state.ledger.render()

    async def count(self) -> ReplicaCounts:
        """Count the agents: all there are to be, those that answer, and those that are ready."""
        _, seen = await self.look()
        believed = [one for one in seen if one.is_believed]
        ready = sum(one.report.readiness for one in believed)
        return ReplicaCounts(len(seen), len(believed), ready)

    async def watch_canary(self, rule: CanaryRule) -> None:
        """Judge the canary that waits, if one does, and write down what comes of it."""
        state, seen = await self.look()
        if (event := state.canary) is None:
            return
        waited = (utc_now() - event.at).total_seconds()
        before = state.head_for("")
        verdict = await judge(rule, event, seen, before, waited)
        if verdict is None:
            return
        is_judged = not verdict.is_good and verdict.is_about_bytes
        if is_judged and not await self._are_still_on(event):
            logger.info("canary %s: not ready all the time, so judged again", event.identity)
            return
        word = FleetEvent(
            event="release" if verdict.is_good else "withdraw",
            at=utc_now(),
            identity=event.identity,
            reason=verdict.reason[:REASON_CHARS],
            refuses=await self._contents_of(event.identity) if is_judged else (),
        )
        if await self._write(word, state):
            done = "released" if verdict.is_good else "withdrawn"
            logger.info("canary %s %s: %s", event.identity, done, verdict.reason or "no gate")
            await nudge(await self.config.addresses.all())

    async def _accept(self, signal: Signal) -> bool:
        """Let the signal into the log, unless it is there; False where another came before it."""
        state, seen = await self.look()
        if is_repeated(state.ledger, signal):
            return True
        believed = self._quorum_of(seen)
        if (canary := state.canary) is not None:
            reason = f"snapshot {canary.identity!r} is being loaded, by canaries"
            if self.config.canary is None:
                reason += "; a door with --canary judges them, a reset forgets them"
            raise RefusedError(400, reason)
        if state.refused and self._keeps_judgements:
            for content in await self._contents_of(signal.identity):
                if (judged := state.refused.get(content)) is not None:
                    refused = f"the same bytes were {_refusal(judged)}"
                    raise RefusedError(400, f"{refused}; a door with --judge-again asks anew")
        late = {one.report.name: one.report.error for one in believed if not one.has_settled(state)}
        if len(believed) - len(late) >= self._needed(len(seen)):
            late = {}  # of those that lag behind a quorum, nobody waits for what they load
        head = state.head_for("")
        members = [
            Member(one.report.current, head if one.report.name in late else None)
            for one in believed
        ]
        if (obstacle := chain_obstacle(state.ledger, signal, members)) is not None:
            waits = "; ".join(f"{name}: {error}" for name, error in late.items() if error)
            raise RefusedError(400, f"{obstacle}. {waits}"[:REASON_CHARS] if waits else obstacle)
        try:
            kind = await asyncio.to_thread(
                inspect_snapshot, self._bucket, signal, self.config.base_model
            )
        except (InvalidSnapshotError, MissingObjectError, BucketError) as error:
            raise RefusedError(400, f"snapshot validation failed: {error}") from None
        if kind is SnapshotKind.LORA:
            raise RefusedError(400, "adapters are not loaded by agents")
        event = FleetEvent(
            event="signal",
            at=utc_now(),
            identity=signal.identity,
            kind=kind,
            previous=signal.previous,
            reset_prompt_cache=signal.reset_prompt_cache,
            transition=self.config.transition,
            canaries=self.config.canary.choose(believed) if self.config.canary else (),
        )
        if not await self._write(event, state):
            return False
        # What one in trouble will go back to, nobody can tell: until it is well, all of it stays.
        if all(one.is_believed and one.report.readiness for one in seen):
            try:
                await self._log.prune({one.report.current for one in seen})
            except StoreError as error:
                logger.warning("the log stays long: %s", error)
        return True

    @property
    def _keeps_judgements(self) -> bool:
        return self.config.canary is not None and self.config.canary.keeps_judgements

    async def _contents_of(self, identity: str) -> tuple[str, ...]:
        """The digests of what an identity stands for, as it was written and as it is restored; none
        where its publisher left no record."""
        try:
            manifest = await read_snapshot_manifest(self._store, identity)
        except StoreUnavailableError as error:
            raise RefusedError(503, f"the store: {error}") from None
        except StoreError:
            return ()  # the agents find what is wrong with it
        return (manifest.content_sha256, manifest.content.sha256) if manifest else ()

    async def _are_still_on(self, event: FleetEvent) -> bool:
        _, seen = await self.look()
        on_it = [one for one in seen if one.is_on(event.identity)]
        return {*event.canaries} <= {one.report.name for one in on_it}

    def _needed(self, count: int) -> int:
        return max(1, ceil(self.config.quorum * count - 1e-9))

    def _quorum_of(self, seen: list[SeenAgent]) -> list[SeenAgent]:
        """Those that are believed, if they are enough.

        Raises:
            RefusedError: 503, they are not.
        """
        believed = [one for one in seen if one.is_believed]
        if len(believed) < self._needed(len(seen)):
            problems = "; ".join(f"{one.url}: {one.problem}" for one in seen if one.problem)
            problems = problems or f"{self.config.addresses.name} has no address"
            found = f"{len(believed)} of {len(seen)} agents can be relied on"
            raise RefusedError(503, f"{found}, {self._needed(len(seen))} are needed. {problems}")
        return believed

    async def _write(self, event: FleetEvent, state: FleetState) -> bool:
        try:
            return await self._log.append(event, after=state)
        except StoreError as error:
            raise RefusedError(503, f"the store: {error}") from None

    def _shown(self, seen: SeenAgent, state: FleetState) -> dict[str, Any]:
        report = seen.report
        if not seen.is_believed:
            return UNKNOWN.replica()
        head = state.head_for(report.name)
        is_still = report.stage in SETTLED_STAGES
        if (word := state.withdrawn) is not None and is_still and report.current == head:
            shown = {"stage": "error", "target": word.identity, "error": _refusal(word)}
            is_final = bool(word.refuses) and self._keeps_judgements
            return report.model_copy(update=shown).replica(is_final=is_final)
        awaited = state.canary.identity if state.canary is not None else head
        if (
            is_still
            and report.current != awaited
            and not (report.stage == "error" and report.target == awaited)
        ):
            return report.model_copy(update={"stage": "pending", "target": awaited}).replica()
        return report.replica()


def _overtaken() -> RefusedError:
    return RefusedError(503, "other signals come in all the time")


def _refusal(word: FleetEvent) -> str:
    return f"withdrawn as {word.identity}: {word.reason}"
