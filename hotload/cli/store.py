"""`store`: what lies in a store, and a person's word on what stays."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hotload.cli.doors import clients_needed, open_services, open_store
from hotload.cli.outcome import FOUND, OK, CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.wording import text_table
from hotload.errors import Finding, InvalidIdentityError, StoreError, StoreUnavailableError
from hotload.identity import SnapshotKind
from hotload.publish.retention import ManifestState, StoredSnapshot, chain_of, why_kept
from hotload.quantities import plural, size

if TYPE_CHECKING:
    from hotload.clients.store.store import Store

Served = Mapping[str, Sequence[str]]


def list_snapshots(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """List every snapshot of a store, with what serves or pins it."""
    with clients_needed():
        stored, served, pins = asyncio.run(_read(options.url, options.service))
    stored.sort(key=lambda one: (*(one.version or (one.identity, 0, 0)), one.attempt))
    gone = sorted(pins - {one.identity for one in stored})
    total = sum(one.size_bytes for one in stored)
    return CommandResult(
        {
            "snapshots": [_facts(one, served, pins) for one in stored],
            "size_bytes": total,
            "pins_without_snapshot": gone,
        },
        lines=(*_table(stored, served, pins), f"{plural(len(stored), 'snapshot')}, {size(total)}"),
        notes=tuple(f"pinned, and not in the store: {one}" for one in gone),
    )


def show_chain(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Show the chain a snapshot is served by, and what follows it."""
    with clients_needed():
        stored, served, pins = asyncio.run(_read(options.url, options.service))
    by_identity = {one.identity: one for one in stored}
    if options.identity not in by_identity:
        raise InvalidIdentityError(options.identity, f"{options.url} has no such snapshot")
    chain = chain_of(options.identity, by_identity)
    missing = [
        one
        for one in chain
        if one not in by_identity or by_identity[one].state is ManifestState.MISSING
    ]
    followers = [
        one
        for one in stored
        if one.identity not in chain and options.identity in chain_of(one.identity, by_identity)
    ]
    followers.sort(key=lambda one: (one.chain_length, one.identity))
    links = [by_identity[one] for one in chain if one in by_identity]
    replay = sum(one.size_bytes for one in links)
    is_whole = not missing and links[0].kind in (SnapshotKind.FULL, SnapshotKind.LORA)
    lines = [*_table(links, served, pins)]
    if is_whole:
        loads = f"a replica that joins late loads {plural(len(links), 'snapshot')}, {size(replay)}"
        lines.append(loads)
    if followers:
        lines += ["followed by", *_table(followers, served, pins)]
    broken = f"{chain[0]} has no manifest here that can be read, so what follows cannot be loaded"
    return CommandResult(
        {
            "chain": [_facts(one, served, pins) for one in links],
            "followers": [_facts(one, served, pins) for one in followers],
            "missing": missing,
            "replay_bytes": replay,
        },
        lines=tuple(lines),
        notes=() if is_whole else (f"the chain is broken: {broken} [publisher acts]",),
        exit_code=OK if is_whole else FOUND,
    )


def pin_snapshot(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Keep a snapshot, with all that it needs, until it is unpinned."""
    with clients_needed():
        from hotload.clients.store.retention import pin

        asyncio.run(pin(open_store(options.url), options.identity))
    return CommandResult({"pinned": options.identity}, lines=(f"{options.identity}: pinned",))


def unpin_snapshot(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Let a snapshot go again."""
    with clients_needed():
        from hotload.clients.store.retention import unpin

        asyncio.run(unpin(open_store(options.url), options.identity))
    return CommandResult({"unpinned": options.identity}, lines=(f"{options.identity}: not pinned",))


def delete_snapshot(options: Namespace, _: ProgressBar | None) -> CommandResult:
    """Remove one snapshot that nothing serves, needs or pins."""
    with clients_needed():
        removed = asyncio.run(_delete(options.url, options.identity, options.service))
    line = f"{removed.identity}: removed, {size(removed.size_bytes)}"
    facts = {"removed": removed.identity, "size_bytes": removed.size_bytes}
    return CommandResult(facts, lines=(line,))


def verify_store(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Hold every object to the digest in its snapshot's manifest."""
    with clients_needed():
        findings, count, checked = asyncio.run(
            _verify(open_store(options.url), options.identity, bar)
        )
    errors = sum(finding.severity == "error" for finding in findings)
    result = f"{plural(errors, 'error')}" if errors else "every digest as its manifest says"
    return CommandResult(
        {
            "snapshot_count": count,
            "size_bytes": checked,
            "findings": [asdict(finding) for finding in findings],
        },
        lines=tuple(map(str, findings)),
        notes=(f"{plural(count, 'snapshot')}, {size(checked)}: {result}",),
        exit_code=FOUND if errors else OK,
    )


async def _read(
    url: str, services: Sequence[str]
) -> tuple[list[StoredSnapshot], Served, frozenset[str]]:
    from hotload.clients.service.served import read_served
    from hotload.clients.store.retention import read_pins, read_stored_snapshots

    store = open_store(url)
    pins = await read_pins(store)
    stored = await read_stored_snapshots(store)
    return stored, await read_served(open_services(services), store.url), pins


async def _delete(url: str, identity: str, services: Sequence[str]) -> StoredSnapshot:
    from hotload.clients.store.publisher_leases import check_lease, every_lease
    from hotload.clients.store.retention import remove_snapshots

    store = open_store(url)
    named = [one.access.service for one in open_services(services)]
    async with every_lease(store, named) as leases:

        async def check() -> None:
            for lease in leases:
                await check_lease(store, lease)

        stored, served, pins = await _read(url, services)
        target = next((one for one in stored if one.identity == identity), None)
        if target is None:
            raise InvalidIdentityError(identity, f"{url} has no such snapshot")
        if reason := why_kept(identity, stored, served=served, pins=pins):
            raise InvalidIdentityError(identity, f"not deleted: {reason}")
        await remove_snapshots(store, [target], check)
    return target


async def _verify(
    store: Store, identities: Sequence[str], bar: ProgressBar | None
) -> tuple[list[Finding], int, int]:
    """What differs, and how many snapshots and bytes were looked at."""
    from hotload.clients.store.records import SNAPSHOTS, read_snapshot_manifest
    from hotload.clients.store.retention import read_stored_snapshots
    from hotload.clients.store.verification import verify_snapshot

    stored = {one.identity: one for one in await read_stored_snapshots(store)}
    if unknown := [one for one in identities if one not in stored]:
        raise InvalidIdentityError(unknown[0], f"{store.url} has no such snapshot")
    chosen = [stored[one] for one in identities or stored]
    total, done = sum(one.size_bytes for one in chosen), 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if bar is not None:
            bar(done, max(done, total))

    findings: list[Finding] = []
    for one in chosen:
        path = f"{SNAPSHOTS}/{one.identity}.json"
        try:
            manifest = await read_snapshot_manifest(store, one.identity)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            is_newer = one.state is ManifestState.NEWER
            reason = "written by a newer version of this program" if is_newer else error.reason
            findings.append(
                Finding("manifest", path, None, reason, "a manifest of ours", "operator")
            )
            continue
        if manifest is None:
            expected = "a manifest; it is an upload under way or broken off"
            findings.append(
                Finding("manifest", path, None, "no such object", expected, "operator", "warning")
            )
            continue
        findings += await verify_snapshot(store, manifest, advance)
    return findings, len(chosen), done


def _table(
    stored: Sequence[StoredSnapshot], served: Served, pins: frozenset[str]
) -> tuple[str, ...]:
    head, *lines = text_table(
        ("snapshot", "kind", "chain", "bytes"),
        [
            (
                one.identity,
                one.kind.value if one.kind else "–",
                str(one.chain_length),
                size(one.size_bytes),
            )
            for one in stored
        ],
    )
    words = (_words(one, served, pins) for one in stored)
    return (head, *(f"{line}  {text}".rstrip() for line, text in zip(lines, words, strict=True)))


def _words(one: StoredSnapshot, served: Served, pins: frozenset[str]) -> str:
    """What there is to say of a snapshot: who serves it, whether it is pinned or in doubt."""
    words = []
    if one.identity in served:
        words.append(f"served by {', '.join(served[one.identity])}")
    if one.identity in pins:
        words.append("pinned")
    if one.state is ManifestState.NEWER:
        words.append("written by a newer version of this program")
    elif one.state is ManifestState.UNREADABLE:
        words.append(f"its manifest cannot be read: {one.detail}")
    elif one.state is ManifestState.MISSING:
        words.append("no manifest: an upload under way or broken off")
    return "; ".join(words)


def _facts(one: StoredSnapshot, served: Served, pins: frozenset[str]) -> dict[str, Any]:
    return {
        "identity": one.identity,
        "manifest": one.state.value,
        "kind": one.kind.value if one.kind else None,
        "run": one.run_id,
        "policy_version": one.policy_version,
        "line": one.version.line if one.version else None,
        "chain_length": one.chain_length,
        "needs": list(one.needs),
        "size_bytes": one.size_bytes,
        "served_by": list(served.get(one.identity, ())),
        "pinned": one.identity in pins,
    }
