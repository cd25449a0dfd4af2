"""The program broken on purpose: what a watch does not see in these, it would not see at all.

Each replaces a part of the program for one world; `python -m tests.simulation.mutants` says in
which seed each was seen, and by which sentence.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flows.publish
import hotload.clients.service.client
import hotload.publish.chain
import tasks.announce
import tasks.plan
import tasks.publication
import tasks.retain
import tasks.upload
import tasks.wait
from hotload.clients.service import HotLoadClient
from hotload.errors import ServiceUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.cost import CostBasis, CostChoice
from hotload.publish.lines import Lines
from hotload.publish.publication import ServicePublication
from hotload.publish.readiness import Convergence
from hotload.publish.snapshot import SnapshotManifest
from tasks.baseline import Baseline
from tasks.publication import OngoingPublication
from tests.simulation.engine import Replaced
from tests.simulation.loop import PROCESS
from tests.simulation.many import be_quiet
from tests.simulation.story import tell

SEEDS = 40


@dataclass(frozen=True)
class Mutant:
    """A broken program; `seed` shows it under faults of `kinds`, in a sentence with `sees`."""

    make: Callable[[Replaced], None]
    seed: int
    kinds: tuple[str, ...]
    sees: str

    def first_seen(self, seeds: Iterable[int]) -> tuple[int, str] | None:
        """Find the first seed whose story shows it, and the sentence that says so."""
        for seed in seeds:
            story = tell(seed, mutate=self.make, kinds=self.kinds)
            if story.violations:
                return seed, story.violations[0]
        return None


MUTANTS: dict[str, Mutant] = {}


def mutant(
    sees: str, *kinds: str, seed: int = 0
) -> Callable[[Callable[[Replaced], None]], Callable[[Replaced], None]]:
    def add(make: Callable[[Replaced], None]) -> Callable[[Replaced], None]:
        MUTANTS[(make.__doc__ or "").rstrip(".")] = Mutant(make, seed, kinds, sees)
        return make

    return add


def _replace_step(replaced: Replaced, module: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(task's own function)` where a step has the task's function."""
    step = getattr(module, name)
    replaced.put(step, "fn", around(step.fn))


@mutant("knows already", seed=2)
def _no_look(replaced: Replaced) -> None:
    """A signal goes out whatever the replicas say."""
    replaced.put(tasks.announce, "may_signal", lambda *_: True)


@mutant("did not see that it has the lease")
def _no_lease_check(replaced: Replaced) -> None:
    """A signal goes out whoever has the lease."""

    async def allow(*_: Any) -> None:
        return None

    replaced.put(tasks.announce, "check_lease", allow)


@mutant("did not see that it has the lease")
def _lease_checked_early(replaced: Replaced) -> None:
    """The lease is looked at before the mark and not after it."""
    check, count = tasks.announce.check_lease, 0

    async def every_other(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count % 2:
            await check(*arguments)

    replaced.put(tasks.announce, "check_lease", every_other)


@mutant("without a mark")
def _no_mark(replaced: Replaced) -> None:
    """No mark says that a signal may have been sent."""

    async def forget(*_: Any) -> None:
        return None

    replaced.put(tasks.announce, "mark_signalled", forget)


@mutant("without a look", "a signal's answer is lost")
def _signalled_again(replaced: Replaced) -> None:
    """A lost answer to a signal is followed by the same signal, without a look."""

    def around(signal: Any) -> Any:
        async def again(service: Any, store: Any, manifest: Any, lease: Any) -> Any:
            try:
                return await signal(service, store, manifest, lease)
            except ServiceUnavailableError as error:
                if error.operation != "signal":
                    raise
                return await service.signal(manifest)

        return again

    _replace_step(replaced, tasks.announce, "signal_snapshot", around)


@mutant("signals the delta", "killed", seed=8)
def _doubt_forgotten(replaced: Replaced) -> None:
    """A delta whose signal is in doubt is sent again by the next process."""
    replaced.put(hotload.publish.chain, "_doubt_about", lambda chain, last: None)


@mutant("which is not stored")
def _manifest_first(replaced: Replaced) -> None:
    """The manifest is written before what it names."""

    def around(upload: Any) -> Any:
        async def first(
            store: Any, view: Any, plan: Any, content: Any, shards: Any, *more: Any
        ) -> Any:
            now = tasks.upload.utc_now()
            manifest = SnapshotManifest.of(plan, content, shards, created_at=now)
            await tasks.upload.write_manifest(store, manifest)
            return await upload(store, view, plan, content, shards, *more)

        return first

    _replace_step(replaced, tasks.upload, "upload_manifests", around)


@mutant("was shown")
def _not_awaited(replaced: Replaced) -> None:
    """A snapshot counts as served once it is signalled."""

    def around(_: Any) -> Any:
        async def believe(*_: Any) -> Convergence:
            return Convergence(3, ((0.0, 3),))

        return believe

    _replace_step(replaced, tasks.wait, "wait_until_ready", around)


@mutant("was shown")
def _first_is_enough(replaced: Replaced) -> None:
    """A snapshot counts as served once one replica serves it."""
    assess = tasks.wait.assess

    def one(*arguments: Any, **named: Any) -> Any:
        return assess(
            *arguments, **{**named, "min_ready_fraction": 0.01, "expected_replica_count": None}
        )

    replaced.put(tasks.wait, "assess", one)


@mutant("nothing is wrong any more", "a file of the work directory damaged", seed=1)
def _any_base(replaced: Replaced) -> None:
    """The bytes of the baseline are believed unread."""

    def believe(self: Baseline, place: Any, manifest: SnapshotManifest) -> bool:
        return isinstance(place, Path) and place.is_dir()

    replaced.put(Baseline, "_is_whole", believe)


@mutant("without a look at the lease", "old snapshots are removed")
def _removed_without_lease(replaced: Replaced) -> None:
    """Retention removes whoever has taken the lease meanwhile."""

    async def allow(*_: Any) -> None:
        return None

    replaced.put(tasks.retain, "check_lease", allow)


@mutant("replicas depend on it", "old snapshots are removed", "somebody rolls back")
def _removed_unasked(replaced: Replaced) -> None:
    """Retention asks no service what it serves."""

    async def nothing(*_: Any) -> dict[str, list[str]]:
        return {}

    replaced.put(tasks.retain, "read_served", nothing)


@mutant("before its manifest", "old snapshots are removed")
def _objects_removed_first(replaced: Replaced) -> None:
    """Retention removes the objects of a snapshot before its manifest."""

    async def remove(store: Any, snapshots: Any, check: Any) -> None:
        for one in snapshots:
            await check()
            for stored in await store.objects(one.identity):
                await store.delete_file(stored.path)

    replaced.put(tasks.retain, "remove_snapshots", remove)


@mutant("was removed", "a delta tears")
def _nothing_tidied(replaced: Replaced) -> None:
    """A failed delta is removed from the store together with its manifest."""

    def around(plan: Any) -> Any:
        async def tidy(service: Any, store: Any, content: Any, reason: str, *cycle: Any) -> Any:
            planned = await plan(service, store, content, reason, *cycle)
            for name in await store.names("_hotload/snapshots"):
                if name.startswith("{}-{:06d}-".format(*cycle)):
                    await store.delete_file(f"_hotload/snapshots/{name}")
            return planned

        return tidy

    _replace_step(replaced, tasks.plan, "plan_fallback", around)


@mutant("as what it is not")
def _whole_delta(replaced: Replaced) -> None:
    """A delta is signalled as if it were a full."""
    signal_body = hotload.clients.service.client.fireworks_api.signal_body

    def without(manifest: SnapshotManifest, **named: Any) -> Any:
        body = signal_body(manifest, **named)
        body.pop("incremental_snapshot_metadata", None)
        return body

    replaced.put(hotload.clients.service.client.fireworks_api, "signal_body", without)


@mutant("RuntimeError", "signal answered 503")
def _unclear_is_done(replaced: Replaced) -> None:
    """An unclear answer to a signal ends the cycle with an error of nobody's."""

    def around(signal: Any) -> Any:
        async def raw(*arguments: Any) -> Any:
            try:
                return await signal(*arguments)
            except ServiceUnavailableError:
                raise RuntimeError("unclear") from None

        return raw

    _replace_step(replaced, tasks.announce, "signal_snapshot", around)


# Several services, lines, cost.


def _first_fleet() -> Any:
    process = PROCESS.get()
    assert process is not None
    return process.world.fleets[0]


@mutant("without a mark", seed=2)
def _one_mark(replaced: Replaced) -> None:
    """One mark says for all services that a signal may have been sent."""
    mark, marked = tasks.announce.mark_signalled, set[str]()

    async def once(store: Any, service: str, identity: str) -> None:
        if identity not in marked:
            marked.add(identity)
            await mark(store, service, identity)

    replaced.put(tasks.announce, "mark_signalled", once)


@mutant("did not see that it has the lease", seed=2)
def _one_lease(replaced: Replaced) -> None:
    """The lease of one service is taken for the leases of all."""
    hold = flows.publish.hold_services

    async def first(right: Any, services: Any, store: Any, holder: str) -> Any:
        (lease,) = (await hold(right, dict([*services.items()][:1]), store, holder)).values()
        return {service.access.service: lease for service in services.values()}

    replaced.put(flows.publish, "hold_services", first)


@mutant("without a look", seed=2)
def _one_look(replaced: Replaced) -> None:
    """The replicas of one service are asked for those of all."""
    observe = HotLoadClient.observe
    replaced.put(HotLoadClient, "observe", lambda _: observe(_first_fleet().client()))


@mutant("knows already", seed=2)
def _one_answer(replaced: Replaced) -> None:
    """A signal goes to every service that one of them is without."""
    may_signal = tasks.announce.may_signal

    def anywhere(*asked: Any) -> bool:
        return may_signal(*asked) or len(_first_fleet().world.fleets) > 1

    replaced.put(tasks.announce, "may_signal", anywhere)


@mutant("to replicas on", "all replicas restart on base weights", seed=2)
def _one_plan(replaced: Replaced) -> None:
    """What is planned for one service goes to all."""
    plans, gate = dict[str, Any](), asyncio.Lock()

    def around(plan: Any) -> Any:
        async def once(spec: Any, *arguments: Any, **named: Any) -> Any:
            async with gate:
                if spec.name not in plans:
                    plans[spec.name] = await plan(spec, *arguments, **named)
            return plans[spec.name]

        return once

    def unknown(status: Any, manifest: SnapshotManifest, *_: Any) -> bool:
        return not status.mentions(manifest.identity)

    _replace_step(replaced, tasks.plan, "plan_snapshot", around)
    replaced.put(tasks.announce, "may_signal", unknown)


@mutant("evaluation serves", seed=2)
def _one_awaited(replaced: Replaced) -> None:
    """What one service serves counts as served by all."""

    def around(wait: Any) -> Any:
        async def first(service: Any, *arguments: Any) -> Any:
            if service.access == _first_fleet().access:
                return await wait(service, *arguments)
            return Convergence(3, ((0.0, 3),))

        return first

    _replace_step(replaced, tasks.wait, "wait_until_ready", around)


@mutant("is content with", "the service stays at zero for minutes", seed=5)
def _one_is_enough(replaced: Replaced) -> None:
    """One service is enough, whatever is required."""
    replaced.put(tasks.publication, "services_needed", lambda *_: 1)


@mutant("and the replicas of evaluation", seed=29)
def _others_left_out(replaced: Replaced) -> None:
    """Where any service is enough, the last is left out."""
    settle = OngoingPublication.settle

    async def leave(self: Any, service: Any, step: Any) -> None:
        name = service.access.service
        if self._needed == len(self._services) or name != self._services[-1]:
            return await settle(self, service, step)
        return self._note(ServicePublication(service=name, failure="left out"))

    replaced.put(OngoingPublication, "settle", leave)


@mutant(
    "replicas depend on it", "old snapshots are removed", "a service is away for minutes", seed=161
)
def _one_service_asked(replaced: Replaced) -> None:
    """Retention asks one service alone what it serves."""
    read = tasks.retain.read_served

    def full(_: Any, *options: Any) -> CostChoice:
        return CostChoice(options, SnapshotKind.FULL, "so that the newest needs nothing")

    replaced.put(CostBasis, "choose", full)
    replaced.put(tasks.retain, "read_served", lambda services, url: read(services[:1], url))


@mutant("lease of evaluation", "old snapshots are removed", seed=2)
def _removed_with_one_lease(replaced: Replaced) -> None:
    """Retention removes as long as it has the lease of one service."""
    check = tasks.retain.check_lease

    async def first(store: Any, lease: Any) -> None:
        if lease.service == _first_fleet().access.service:
            await check(store, lease)

    replaced.put(tasks.retain, "check_lease", first)


@mutant(
    "of an old line",
    "a trainer resumes, and the one before goes on",
    "all replicas restart on base weights",
)
def _old_lines_go_on(replaced: Replaced) -> None:
    """A trainer of an old line is not refused."""
    replaced.put(Lines, "refuse_older", lambda *_: None)


@mutant("and its full hardly more", "the weights become completely other", seed=1)
def _delta_at_any_cost(replaced: Replaced) -> None:
    """A delta is published whatever it costs."""

    def delta(_: Any, *options: Any) -> CostChoice:
        return CostChoice(options, SnapshotKind.DELTA, "because it is one")

    replaced.put(CostBasis, "choose", delta)


@mutant("has not ended", "a replica restarts on base weights", seed=1)
def _waits_for_ever(replaced: Replaced) -> None:
    """A wait for replicas has no deadline."""
    replaced.put(tasks.wait, "ReadinessTimeoutError", _NeverError)
    replaced.put(tasks.wait, "monotonic", lambda: 0.0)


class _NeverError(Exception):
    """Is never raised."""


if __name__ == "__main__":
    be_quiet()
    unseen = 0
    for name, each in MUTANTS.items():
        seen = each.first_seen((each.seed, *range(SEEDS)))
        unseen += seen is None
        print(f"{name}: " + (f"seed {seen[0]}: {seen[1]}" if seen else "NOT SEEN"), flush=True)
    sys.exit(bool(unseen))
