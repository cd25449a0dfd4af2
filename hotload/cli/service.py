"""`service`: what the replicas of a service do, why, and what is next; its ledger."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hotload.cli.doors import clients_needed, open_declared, open_services, open_store
from hotload.cli.outcome import FOUND, OK, CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.refusals import UsageError
from hotload.cli.wording import one_line, text_table
from hotload.publish.explain import BY_ITSELF, Explanation, explain_service
from hotload.publish.lease import RETENTION
from hotload.publish.readiness import BASE_WEIGHTS, ReplicaStatus, ServiceStatus

if TYPE_CHECKING:
    from hotload.clients.service.client import HotLoadClient
    from hotload.clients.store.store import Store
    from hotload.publish.lease import Lease

NO_LEDGER = "its API has no ledger: nothing to read, nothing to reset"
HOLDER = "hotload service reset"
ENTRY_CHARS = 600


def show_status(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Show every replica of a service and, where a store is named, explain where they stand."""
    with clients_needed():
        service, store = _open(options)
        status, explanation = asyncio.run(_read_status(service, store))
    replicas = status.replicas
    facts: dict[str, Any] = {
        "service": service.access.service,
        "has_ledger": service.access.api.has_control_plane,
        "replicas": [_facts(one) for one in replicas],
    }
    lines = [*_table(replicas)]
    if explanation is None:
        lines.append(f"{service.access.service}: {status.describe()}")
        notes = ("what is to be done is said where a store is named: --store, or in a cycle file",)
        return CommandResult(facts, lines=tuple(lines), notes=notes)
    lines += [*explanation.seen, f"next: {explanation.next_step}"]
    code = FOUND if explanation.needs_person else OK
    return CommandResult(
        facts | {"explanation": asdict(explanation)}, lines=tuple(lines), exit_code=code
    )


def show_ledger(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Show what a service has loaded since its ledger was reset, newest first."""
    with clients_needed():
        service, _store = _open(options)
        entries = asyncio.run(service.read_ledger())
    name = service.access.service
    if entries is None:
        return CommandResult({"service": name, "entries": None}, lines=(f"{name}: {NO_LEDGER}",))
    lines = tuple(line for entry in entries for line in _entry_lines(entry))
    return CommandResult(
        {"service": name, "entries": entries},
        lines=lines or (f"{name}: the ledger is empty; the next signal has to be a full snapshot",),
    )


def reset_ledger_by_hand(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Reset a service's ledger, once a person has named the service."""
    with clients_needed():
        service, store = _open(options)
        name = service.access.deployment_id
        if not service.access.api.has_control_plane:
            raise UsageError(f"{name}: {NO_LEDGER}")
        served = asyncio.run(service.observe()).describe()
        _require_confirmation(name, served, has_store=store is not None, is_given=options.yes)
        asyncio.run(_reset(service, store))
    line = f"{name}: its ledger is reset and {BASE_WEIGHTS} answer; {BY_ITSELF}"
    return CommandResult({"service": name, "reset": True, "served_before": served}, lines=(line,))


def _open(options: Namespace) -> tuple[HotLoadClient, Store | None]:
    """The service, and the store if one is named: --store goes before the cycle file's."""
    if options.cycle is not None:
        service, store = open_declared(options.cycle)
    else:
        (service,), store = open_services([options.service]), None
    return service, open_store(options.store) if options.store else store


async def _read_status(
    service: HotLoadClient, store: Store | None
) -> tuple[ServiceStatus, Explanation | None]:
    # The status first: what a replica knows by then has its manifest in the store.
    status = await service.observe()
    if store is None:
        return status, None
    from hotload.clients.store.records import read_signalled
    from hotload.clients.store.retention import read_stored_snapshots

    stored = await read_stored_snapshots(store)
    signalled = await read_signalled(store, service.access.service)
    holder = await _holder(store, service.access.service)
    return status, explain_service(status, stored, signalled=signalled, holder=holder)


async def _holder(store: Store, service: str) -> Lease | None:
    """The lease that keeps others from publishing to the service now, as far as this machine can
    see; that of an earlier version of hotload names no service."""
    from hotload.clients.store.publisher_leases import held_leases

    held = {lease.service: lease for lease in await held_leases(store)}
    return next((held[one] for one in (service, RETENTION, "") if one in held), None)


async def _reset(service: HotLoadClient, store: Store | None) -> None:
    """Reset it while no cycle publishes, where the store is known."""
    from hotload.clients.store.publisher_leases import check_lease, publisher_lease

    async with AsyncExitStack() as right_to_publish:
        if store is not None:
            held = publisher_lease(store, service.access.service, HOLDER)
            lease = await right_to_publish.enter_async_context(held)
            await check_lease(store, lease)
        await service.reset_ledger()


def _require_confirmation(name: str, served: str, *, has_store: bool, is_given: bool) -> None:
    """Return if `--yes` was given, or the service's name is typed.

    Raises:
        UsageError: something else was typed, or nothing.
    """
    if is_given:
        return
    now = one_line(f"{name} serves {served}")
    if not has_store:
        now = f"{now}. No store is named, so whether a cycle publishes to it now is unknown"
    print(f"{now}. A reset forgets it, and {BASE_WEIGHTS} answer.", file=sys.stderr)
    print(f"Type {name} to reset its ledger: ", end="", file=sys.stderr, flush=True)
    if sys.stdin is None or sys.stdin.readline().strip() != name:
        raise UsageError(f"nothing was reset: found another name or none, expected {name} or --yes")


def _table(replicas: tuple[ReplicaStatus, ...]) -> list[str]:
    if not replicas:
        return []
    head, *lines = text_table(
        ("replica", "ready", "stage"),
        [
            (str(number), "yes" if one.readiness else "no", one.stage or "–")
            for number, one in enumerate(replicas, start=1)
        ],
    )
    # A vendor's field for why a load failed is not known: such a replica is shown as it is.
    said = [
        f"{one.describe()}: {one.raw}" if one.stage == "error" and not one.error else one.describe()
        for one in replicas
    ]
    return [head, *(f"{line}  {words}" for line, words in zip(lines, said, strict=True))]


def _facts(replica: ReplicaStatus) -> dict[str, Any]:
    return {
        "ready": replica.readiness,
        "identity": replica.current_identity,
        "stage": replica.stage,
        "target": replica.target_identity,
        "adapters": dict(replica.adapters),
        "words": replica.describe(),
        "as_shown": replica.raw,
    }


def _entry_lines(entry: Any) -> Iterator[str]:
    """An entry in words where it is of the form we know, else as the service gave it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("identity"), str):
        yield json.dumps(entry)[:ENTRY_CHARS]
        return
    follows = entry.get("previous_snapshot_identity")
    words = f"{entry['identity']}  {entry.get('kind', '')}"
    yield f"{words}, follows {follows}" if follows else words
    replicas = entry.get("replicas")
    for one in replicas if isinstance(replicas, list) else []:
        yield f"  {json.dumps(one)[:ENTRY_CHARS]}"
