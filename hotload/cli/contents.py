"""`inspect`: what a directory holds, and per layer how much of it changed."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hotload.checkpoint.anatomy import is_delta
from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.quantization import describe_quantization
from hotload.checkpoint.safetensors import read_json_object
from hotload.checkpoint.sub_configs import is_tied
from hotload.cli.outcome import CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.wording import density_percent, ratio, text_table
from hotload.delta.dialects import Dialect
from hotload.delta.inspect_delta import (
    PartFacts,
    TensorFacts,
    delta_facts,
    facts_by_part,
    plain_facts,
    spec_forms,
    total_facts,
)
from hotload.directory.inputs import open_delta
from hotload.directory.shards import read_checkpoint
from hotload.errors import Finding, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import MANIFEST_LIMIT_BYTES, SnapshotManifest
from hotload.quantities import plural, size

FIREWORKS = Dialect.FIREWORKS.value

# Where the publisher keeps its records, seen from the directory of a snapshot in a local bucket.
_RECORDS = Path("..", "_hotload", "snapshots")


def kind_of(checkpoint: Checkpoint) -> SnapshotKind:
    """Tell whether the files are a full checkpoint, a delta or a LoRA."""
    if checkpoint.is_lora:
        return SnapshotKind.LORA
    index = _document(checkpoint, INDEX_FILE)
    return SnapshotKind.DELTA if is_delta(checkpoint.shards, index) else SnapshotKind.FULL


def inspect(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Show kind, lineage, tensors, bytes, and what changed per layer."""
    directory: Path = options.dir
    checkpoint = read_checkpoint(directory)
    kind = kind_of(checkpoint)
    if kind is SnapshotKind.FULL and not any(shard.tensors for shard in checkpoint.shards):
        expected = "a checkpoint's shards"
        raise InvalidCheckpointError(
            (Finding("no_shard", str(directory), None, "no tensor", expected),)
        )
    facts: dict[str, Any] = {"directory": str(directory), "kind": kind.value}
    lines: list[str]
    if kind is SnapshotKind.DELTA:
        more, tensors = _delta(directory, checkpoint, bar)
        facts |= more
        lines = _delta_lines(facts)
    else:
        tensors = tuple(plain_facts(checkpoint.shards))
        facts |= _model(checkpoint)
        lines = _plain_lines(facts)
    everything = total_facts("all", tensors)
    unchanged = sum(one.changed_element_count == 0 for one in tensors)
    facts |= {
        "shard_count": len(checkpoint.shards),
        **_part(everything),
        # In the dialects of changed tensors only, the others are not there to be counted.
        "unchanged_tensor_count": unchanged if facts.get("dialect") == FIREWORKS else None,
        "dtypes": _dtypes(tensors),
        "parts": [{"part": one.part, **_part(one)} for one in facts_by_part(tensors)],
    }
    lines += _total_lines(facts, everything)
    return CommandResult(facts, (*lines, "", *_table(facts_by_part(tensors), everything)))


def _document(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    data = checkpoint.documents.get(name)
    return None if data is None else read_json_object(data, file=name)


def _delta(
    directory: Path, checkpoint: Checkpoint, bar: ProgressBar | None
) -> tuple[dict[str, Any], tuple[TensorFacts, ...]]:
    forms = spec_forms(_document(checkpoint, SPEC_FILE) or {})
    tensors: list[TensorFacts] = []
    with open_delta(directory) as delta:
        total_bytes = sum(payload.end - payload.start for payload in delta.payloads.values())
        done = 0
        for name, payload in delta.payloads.items():
            tensors.append(delta_facts(name, payload, forms.get(name)))
            done += payload.end - payload.start
            if bar:
                bar(done, total_bytes)
        facts = {
            "dialect": delta.dialect.value,
            "checksum": delta.envelope.checksum.value,
            "lineage": None if delta.lineage is None else asdict(delta.lineage),
            "chain": _chain(directory),
            "counted_in": "elements" if all(one.dtype for one in tensors) else "bytes",
        }
    return facts, tuple(tensors)


def _chain(directory: Path) -> dict[str, Any] | None:
    """What the publisher recorded of this snapshot, where the directory lies in its bucket."""
    name = directory.resolve().name
    record = directory.resolve() / _RECORDS / f"{name}.json"
    if not record.is_file():
        return None
    with record.open("rb") as file:
        manifest = SnapshotManifest.parse(file.read(MANIFEST_LIMIT_BYTES), identity=name)
    keys = {"identity", "previous", "anchor", "chain_length", "policy_version", "reason"}
    return manifest.model_dump(include=keys)


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.is_lora:
        adapter = _document(checkpoint, ADAPTER_CONFIG_FILE) or {}
        names = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
        return {"adapter": {name: adapter.get(name) for name in names}}
    config = _document(checkpoint, CONFIG_FILE) or {}
    return {
        "model_type": config.get("model_type"),
        "is_tied": is_tied(config),
        "quantization": describe_quantization(tuple(checkpoint.tensors), config) or None,
    }


def _part(part: PartFacts) -> dict[str, Any]:
    facts = asdict(part)
    del facts["part"]
    ratio = part.size_bytes / part.stored_size_bytes if part.stored_size_bytes else None
    return facts | {"density": part.density, "ratio": ratio}


def _dtypes(tensors: Sequence[TensorFacts]) -> dict[str, int]:
    """Bytes by dtype, the most first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype or "unknown dtype"] += tensor.size_bytes
    return dict(counts.most_common())


def _delta_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['directory']}: delta, dialect {facts['dialect']}"]
    lineage, chain = facts["lineage"], facts["chain"]
    if lineage is not None:
        lines.append(f"makes {lineage['version']} of {lineage['base_version']}")
    elif chain is None:
        lines.append("its files do not say what it follows: that is in the signal")
    if chain is not None:
        length, anchor = chain["chain_length"], chain["anchor"]
        lines.append(f"follows {chain['previous']}; number {length} after the full {anchor}")
    return lines


def _plain_lines(facts: dict[str, Any]) -> list[str]:
    if adapter := facts.get("adapter"):
        base, rank = adapter["base_model_name_or_path"], adapter["r"]
        return [f"{facts['directory']}: LoRA of {base}, rank {rank}"]
    tied = ", head tied to the embeddings" if facts["is_tied"] else ""
    line = f"{facts['directory']}: full checkpoint, model_type {facts['model_type']}{tied}"
    return [line, *([f"quantized: {told}"] if (told := facts["quantization"]) else [])]


def _total_lines(facts: dict[str, Any], everything: PartFacts) -> list[str]:
    tensors = plural(everything.tensor_count, "tensor")
    shards = plural(facts["shard_count"], "shard")
    dtypes = ", ".join(f"{name} {size(amount)}" for name, amount in facts["dtypes"].items())
    lines = [f"{tensors} in {shards}: {dtypes or 'nothing'}"]
    if everything.changed_element_count is not None:
        stored, whole = everything.stored_size_bytes, everything.size_bytes
        line = f"{size(stored)} for {size(whole)}, 1 : {ratio(whole, stored)}"
        changed = f"{density_percent(everything.density)} of the {facts['counted_in']} changed"
        unchanged = facts["unchanged_tensor_count"]
        more = "" if unchanged is None else f"; {plural(unchanged, 'tensor')} unchanged"
        lines.append(f"{line}; {changed}{more}")
    return lines


def _table(rows: Sequence[PartFacts], everything: PartFacts) -> list[str]:
    head = ["part", "tensors", "bytes"]
    cells = [[one.part, str(one.tensor_count), size(one.size_bytes)] for one in rows]
    if everything.changed_element_count is not None:
        head += ["stored", "1 :", "changed"]
        for row, one in zip(cells, rows, strict=True):
            stored = one.stored_size_bytes
            row += [size(stored), ratio(one.size_bytes, stored), density_percent(one.density)]
    return text_table(head, cells)
