"""Which files beside the shards belong to the model: those that a server reads.

A server reads JSON and text of the model and its tokenizer, templates, and the code that
`auto_map` names. What else a trainer leaves there (optimizer and random states, logs, markers of
its step, pickles) changes with every step: published, it would force every snapshot to be full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from hotload.checkpoint.checkpoint import LeftOut
from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX

CODE_SUFFIX = ".py"
NAMED_TEMPLATES = "additional_chat_templates"
FOREIGN_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")

_OF_TOKENIZER = re.compile(r"(?is).*\.(?:jinja|model|tiktoken|spm|bpe|codes)|tokenizer\.model.*")
_DOCUMENT = re.compile(r"(?is).*\.(?:json|txt)")
# Of what the model's documents are about; trainer_state.json, all_results.json are of none.
_ABOUT_MODEL = re.compile(
    r"(?i)config|token|vocab|merges|dict|coder|template|processor|normalizer|params|tekken"
    r"|modules|\.index\.json$|\.spec\.json$"
)
_ADAPTER_PICKLE = re.compile(r"adapter_model(?:-.+)?\.bin")
_IMPORT = re.compile(r"^\s*from\s+\.(\w*)\s+import\s+(\w+)", re.MULTILINE)


def reason_to_leave_out(file: str, code: frozenset[str]) -> str | None:
    """Say why a file stays behind; None for a shard, or a file that a server reads.

    `code` names the modules that it loads.
    """
    if file.endswith(SHARD_SUFFIX) or _ADAPTER_PICKLE.fullmatch(file):
        return None
    if file.endswith(".index.json") and file != INDEX_FILE:
        return "index of weights in another format"
    if file.endswith(CODE_SUFFIX):
        return None if file in code else "code that no auto_map leads to"
    if _OF_TOKENIZER.fullmatch(file):
        return None
    if _DOCUMENT.fullmatch(file) and _ABOUT_MODEL.search(file):
        return None
    if file.endswith(FOREIGN_WEIGHT_SUFFIXES):
        return f"weights are read from {SHARD_SUFFIX} alone"
    return "no server reads it"


def directory_left_out(name: str) -> LeftOut:
    """Say of a directory in a checkpoint that it stays behind, and what is lost with it."""
    if name == NAMED_TEMPLATES:
        return LeftOut(name, "replicas read no directories: the model loses these chat templates")
    return LeftOut(name, "a directory")


def code_loaded(documents: Iterable[bytes], sources: Mapping[str, bytes]) -> frozenset[str]:
    """Find the modules among `sources` that a server loads.

    Those that an `auto_map` in the documents names, and what they import from beside them.
    """
    found: set[str] = set()
    waiting = [f"{name}{CODE_SUFFIX}" for data in documents for name in _mapped(data)]
    while waiting:
        file = waiting.pop()
        if file in found or file not in sources:
            continue
        found.add(file)
        text = sources[file].decode(errors="replace")
        waiting += [f"{one or name}{CODE_SUFFIX}" for one, name in _IMPORT.findall(text)]
    return frozenset(found)


def _mapped(data: bytes) -> Iterator[str]:
    """The modules that `auto_map` names: `modeling_x.Model`, `repo--modeling_x.Model`."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return  # another check says so
    mapped = document.get("auto_map") if isinstance(document, dict) else None
    if not isinstance(mapped, dict):
        return
    for value in mapped.values():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield name.rpartition("--")[2].partition(".")[0]
