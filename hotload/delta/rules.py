"""The rules of a delta on the checkpoint that it follows (wire-format §1 to §3, §6)."""

from __future__ import annotations

from collections.abc import Iterator

from hotload.checkpoint.names import ADAPTER_CONFIG_FILE
from hotload.checkpoint.safetensors import (
    Checkpoint,
    ShardHeader,
    TensorInfo,
    check_size,
    first_names,
)
from hotload.delta.envelope import ARC_V2, Envelope
from hotload.errors import Finding, shorten


def check_delta(delta: Checkpoint, previous: Checkpoint) -> tuple[Finding, ...]:
    """Every broken rule of a delta snapshot on the layout it follows (wire-format §2, §6).

    The shards of `previous` and no other, the same tensors in each, payloads as vectors of U8, one
    decimal Adler-32 per tensor, every other file byte-equal. Whether the frames decode is for
    `hotload.delta` to say.
    """
    findings: list[Finding] = []
    if delta.is_lora:
        findings.append(
            _ours("adapter_in_delta", ADAPTER_CONFIG_FILE, None, "a file", "none in a delta")
        )
    shards, parents = _by_file(delta), _by_file(previous)
    for file in sorted(parents.keys() - shards.keys()):
        findings.append(
            _ours("missing_shard", file, None, "no such file", "every shard of previous")
        )
    for file in sorted(shards.keys() - parents.keys()):
        findings.append(_ours("stray_shard", file, None, "a shard", "only the shards of previous"))
    for file in sorted(shards.keys() & parents.keys()):
        findings += check_delta_shard(shards[file], parents[file])
        findings += check_size(file, shards[file].size_bytes)
    for file in _changed_side_files(previous, delta):
        findings.append(_ours("side_file", file, None, "other bytes", "the bytes of previous"))
    return tuple(findings)


def check_delta_shard(delta: ShardHeader, base: ShardHeader) -> Iterator[Finding]:
    """Broken rules of a delta shard's header on the shard it applies to (wire-format §1, §2)."""
    for name in sorted(base.by_name.keys() - delta.by_name.keys()):
        yield _ours(
            "missing_tensor", delta.file, name, "no payload", "every tensor of the base shard"
        )
    for name in sorted(delta.by_name.keys() - base.by_name.keys()):
        yield _ours("extra_tensor", delta.file, name, "a payload", "only tensors of the base shard")
    for tensor in delta.tensors:
        yield from check_payload(delta, tensor, ARC_V2)


def check_payload(delta: ShardHeader, tensor: TensorInfo, envelope: Envelope) -> Iterator[Finding]:
    """Broken rules of one tensor in a delta shard's header (wire-format §1, §3)."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1:
        found = f"{tensor.dtype} {shorten(list(tensor.shape))}"
        yield _ours("payload", delta.file, tensor.name, found, "U8 [bytes of the frame]")
    text = delta.metadata.get(tensor.name)
    if envelope.parse(text) is None:
        found = "no checksum" if text is None else shorten(text)
        expected = f"{envelope.described} in __metadata__"
        yield _ours("checksum", delta.file, tensor.name, found, expected)


def delta_obstacle(previous: Checkpoint, target: Checkpoint) -> str | None:
    """Say why `target` cannot be a delta on `previous`; None when it can (wire-format §6, protocol
    §18).

    A delta needs the same shards holding the same tensors in the same order, and every other file
    byte-equal. Shard metadata may differ: the restored shard carries that of `previous`.
    """
    before, after = _by_file(previous), _by_file(target)
    if before.keys() != after.keys():
        return f"shard files changed: {first_names(before.keys() ^ after.keys())}"
    for file in sorted(before):
        if reason := shard_obstacle(before[file], after[file]):
            return reason
    changed = _changed_side_files(previous, target)
    return f"files beside the shards changed: {first_names(changed)}" if changed else None


def shard_obstacle(base: ShardHeader, target: ShardHeader) -> str | None:
    """Say why one shard cannot be a delta on another; None when it can."""
    if base.tensors == target.tensors:
        return None
    if base.by_name.keys() != target.by_name.keys():
        changed = base.by_name.keys() ^ target.by_name.keys()
        return f"tensors of {target.file} changed: {first_names(changed)}"
    for name, old in base.by_name.items():
        new = target.by_name[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            was, now = f"{old.dtype} {list(old.shape)}", f"{new.dtype} {list(new.shape)}"
            return f"{name} in {target.file} changed from {was} to {now}"
    return f"order of tensors in {target.file} changed"


def _by_file(checkpoint: Checkpoint) -> dict[str, ShardHeader]:
    return {shard.file: shard for shard in checkpoint.shards}


def _changed_side_files(previous: Checkpoint, target: Checkpoint) -> list[str]:
    before = {side.file: side.sha256 for side in previous.side_files}
    after = {side.file: side.sha256 for side in target.side_files}
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


def _ours(rule: str, file: str, tensor: str | None, found: str, expected: str) -> Finding:
    return Finding(rule, file, tensor, found, expected, who="publisher")
