"""What is remembered of the states of a training run, beside its step records.

_hotload/training/<run>/states/removed/000000007.json         the state of a step is gone, or going
_hotload/training/<run>/states/kept/000000007-<branch>.json   a branch begins with it

A removal writes its mark and then looks for branches; a branch writes its own and then looks for
that mark. So one of the two sees the other.
"""

from collections import defaultdict
from collections.abc import Iterable

from hotload.clients.store.records import READ_CONCURRENCY
from hotload.clients.store.step_records import TRAINING
from hotload.clients.store.store import Store
from hotload.concurrently import overlap
from hotload.errors import IdentityConflictError


async def read_removed(store: Store, run_id: str) -> set[int]:
    """Read of which steps the state is removed, or about to be.

    Raises:
        StoreError: the store refuses.
    """
    return {int(_stem(name)) for name in await store.names(_removed(run_id))}


async def mark_removed(store: Store, run_id: str, steps: Iterable[int]) -> None:
    """Note that the states of these steps go, before they do.

    Raises:
        StoreError: the store refuses.
    """
    paths = [f"{_removed(run_id)}/{one:09d}.json" for one in sorted(steps)]
    for start in range(0, len(paths), READ_CONCURRENCY):
        some = paths[start : start + READ_CONCURRENCY]
        await overlap(store.create_bytes(b"{}", path) for path in some)


async def read_branches(store: Store, run_id: str) -> dict[int, list[str]]:
    """Read which runs begin with the state of which step.

    Raises:
        StoreError: the store refuses.
    """
    found: defaultdict[int, list[str]] = defaultdict(list)
    for name in sorted(await store.names(_kept(run_id))):
        step, _, branch = _stem(name).partition("-")
        found[int(step)].append(branch)
    return dict(found)


async def keep_for_branch(store: Store, run_id: str, step: int, branch: str) -> None:
    """Keep the state of a step for a run that begins with it; it may say so again.

    Raises:
        IdentityConflictError: it is removed, or about to be.
        StoreError: the store refuses.
    """
    path = f"{_kept(run_id)}/{step:09d}-{branch}.json"
    if await store.create_bytes(b"{}", path) and step in await read_removed(store, run_id):
        await store.delete_file(path)
        reason = f"init_from_checkpoint: the state of step {step} was removed, as keep_states says"
        raise IdentityConflictError(run_id, f"{reason}; choose a step whose state --list shows")


def _removed(run_id: str) -> str:
    return f"{TRAINING}/{run_id}/states/removed"


def _kept(run_id: str) -> str:
    return f"{TRAINING}/{run_id}/states/kept"


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")
