"""Side files of a snapshot that is in the store, put again under the identity of the next."""

from __future__ import annotations

import hashlib

from hotload.clients.store.store import Store
from hotload.directory.shards import DOCUMENT_LIMIT_BYTES
from hotload.errors import BaselineLostError, StoreError, StoreUnavailableError
from hotload.records import FileDigest

# Read by whoever looks for a snapshot's names, so they follow everything they name.
MANIFESTS_LAST = ("config.json", "model.weight.spec.json", "model.safetensors.index.json")


def in_order(side_files: tuple[FileDigest, ...]) -> list[FileDigest]:
    """Sort side files as they are put: index last."""
    order = {name: rank for rank, name in enumerate(MANIFESTS_LAST, start=1)}
    return sorted(side_files, key=lambda one: (order.get(one.file, 0), one.file))


async def put_again(store: Store, identity: str, previous: str, file: FileDigest) -> None:
    """Put a file of `previous` under `identity`, as it was published there.

    Raises:
        BaselineLostError: the store has lost it, or has another.
        StoreError: the store refuses.
    """
    try:
        data = await store.read_bytes(f"{previous}/{file.file}", limit_bytes=DOCUMENT_LIMIT_BYTES)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        raise BaselineLostError(previous, str(error)) from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise BaselineLostError(previous, f"{file.file} in the store is not what was published")
    await store.put_bytes(data, f"{identity}/{file.file}")
