"""The state of a trainer as one file: named arrays and a few facts, held to their digest.

A safetensors file, so that weights, optimizer and random state can be looked at with any reader.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.files import replacing_file, sha256_file, sync_directory
from hotload.directory.shards import open_shard
from hotload.errors import InvalidCheckpointError, StoreError
from hotload.training.settings import StateRef

DTYPES: Mapping[str, str] = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "|u1"}
SUFFIX = ".state.safetensors"
FACTS = "facts"
WAY_ON = "bring it back, or branch off an earlier one by init_from_checkpoint under another run_id"

Arrays = Mapping[str, NDArray[Any]]


def write_state(directory: Path, name: str, arrays: Arrays, facts: Mapping[str, Any]) -> StateRef:
    """Write a state durably below `directory`; the file's name ends with its digest, so that
    another state under the same name takes the place of none.

    Args:
        name: one path segment.
        arrays: of float32, float64, int64 or uint8.
        facts: as JSON; what has to fit when it is loaded.

    Returns:
        its place relative to `directory`, which may be moved.

    Raises:
        StoreError: it cannot be written; nothing is left of it.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"state {name!r}: expected one path segment")
    names = {np.dtype(text): dtype for dtype, text in DTYPES.items()}
    infos: list[TensorInfo] = []
    end = 0
    for key, array in arrays.items():
        start, end = end, end + array.nbytes
        infos.append(TensorInfo(key, names[array.dtype], array.shape, start, end))
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256()
    fresh = directory / f"{name}.new"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing_file(fresh) as file:
            head = memoryview(render_header(infos, {FACTS: text}))
            for piece in (head, *map(_bytes, arrays.values())):
                digest.update(piece)
                file.write_at(file.size_bytes, piece)
        target = directory / f"{name}-{digest.hexdigest()[:16]}{SUFFIX}"
        fresh.replace(target)
        sync_directory(directory)
    except OSError as error:
        reason = f"the state cannot be written: {error.strerror or error}"
        raise StoreError(str(fresh), reason) from error
    return StateRef(path=target.name, sha256=digest.hexdigest())


def read_state(directory: Path, ref: StateRef) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read arrays and facts of a state that `write_state` wrote.

    Raises:
        StoreError: there is none at its place, or it has other bytes than were written.
    """
    path = _place(directory, ref)
    try:
        if (found := sha256_file(path)) != ref.sha256:
            expected = f"{found[:12]}…, expected {ref.sha256[:12]}…"
            why = f"not the state that was saved: its digest is {expected}; {WAY_ON}"
            raise StoreError(str(path), why)
        with open_shard(path) as shard:
            facts = json.loads(shard.header.metadata[FACTS])
            arrays: dict[str, NDArray[Any]] = {}
            for tensor in shard.header.tensors:
                array = np.empty(math.prod(tensor.shape), DTYPES[tensor.dtype])
                shard.read_into(shard.header.data_start + tensor.start, _bytes(array))
                arrays[tensor.name] = array.reshape(tensor.shape)
    except InvalidCheckpointError as error:
        why = f"no state to load: {error.findings[0].summary}; {WAY_ON}"
        raise StoreError(str(path), why) from None
    except (KeyError, ValueError) as error:
        raise StoreError(str(path), f"a state of another program: {error}") from None
    return arrays, facts


def remove_state(directory: Path, ref: StateRef) -> None:
    """Remove a state that `write_state` wrote; nothing happens where it is gone.

    Raises:
        StoreError: it cannot be removed.
    """
    path = _place(directory, ref)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        reason = f"the state cannot be removed: {error.strerror or error}"
        raise StoreError(str(path), reason) from error


def _place(directory: Path, ref: StateRef) -> Path:
    if Path(ref.path).name != ref.path:
        raise StoreError(ref.path, "expected the name of a state's file, without directories")
    return directory / ref.path


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
