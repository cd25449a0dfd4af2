"""Whether a signal is let in: what is known of it, the chain it follows, the files it names.

The refusals of protocol §4, for every service that answers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.failures import RefusedError
from agent.fleet.ledger import Ledger
from agent.fleet.signals import Signal
from agent.fleet.validation import BaseModel, validate_full, validate_lora
from agent.loading.bucket import SnapshotBucket
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE
from hotload.identity import SnapshotKind

UNCHAINED = "incremental snapshot refused"


@dataclass(frozen=True, slots=True)
class Member:
    """What a replica serves, and what it loads."""

    current: str | None
    loading: str | None


def is_repeated(ledger: Ledger, signal: Signal) -> bool:
    """Tell whether a signal was accepted before.

    Raises:
        RefusedError: 400, its identity was, with other metadata.
    """
    known = ledger.get(signal.identity)
    if known is not None and known.load.previous != signal.previous:
        message = f"identity {signal.identity!r} was signalled before with other metadata"
        raise RefusedError(400, message)
    return known is not None


def chain_obstacle(ledger: Ledger, signal: Signal, replicas: Iterable[Member]) -> str | None:
    """Say why the replicas cannot go from where they stand to the signalled snapshot."""
    replicas = [*replicas]
    loading = {replica.loading for replica in replicas} - {None, signal.identity}
    if loading:
        return f"snapshot {min(filter(None, loading))!r} is being loaded"
    if signal.previous is None:
        return None
    if ledger.get(signal.previous) is None:
        return f"{UNCHAINED}: {signal.previous!r} is not in the ledger"
    if all(replica.current != signal.previous for replica in replicas):
        return f"{UNCHAINED}: {signal.previous!r} is not the snapshot being served"
    return None


def inspect_snapshot(
    bucket: SnapshotBucket, signal: Signal, base: BaseModel | None, *, needs_spec: bool = True
) -> SnapshotKind:
    """Tell what kind of snapshot is signalled; a full or an adapter is validated on the way,
    against the base model where one is known, and a full's spec where it needs one. Blocking.

    Raises:
        InvalidSnapshotError: the first broken rule.
        MissingObjectError, BucketError: as the bucket says.
    """
    files = bucket.files(signal.identity)
    if ADAPTER_CONFIG_FILE in files:
        if signal.previous is None:
            validate_lora(bucket, signal.identity, files, base)
        return SnapshotKind.LORA
    if signal.previous is not None:
        return SnapshotKind.DELTA
    ignored = list(signal.extra_fields_ignore)
    validate_full(bucket, signal.identity, files, base, ignored, needs_spec=needs_spec)
    return SnapshotKind.FULL
