"""The rules of a delta on the checkpoint that it follows (wire-format §1 to §3, §6)."""

from __future__ import annotations

import json

from hotload.checkpoint.checkpoint import Checkpoint
from hotload.checkpoint.meaning import means_same
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE
from hotload.checkpoint.safetensors import ShardHeader, check_size, first_names
from hotload.delta.envelope import check_delta_shard, publisher_finding, shard_obstacle
from hotload.errors import Finding
from hotload.quantities import size


def check_delta(delta: Checkpoint, previous: Checkpoint) -> tuple[Finding, ...]:
    """Collect every broken rule of a delta snapshot on the layout it follows (wire-format §2, §6).

    The shards of `previous` and no other, the same tensors in each, payloads as vectors of U8, one
    decimal Adler-32 per tensor, every other file byte-equal. Whether the frames decode is for
    `hotload.delta` to say.
    """
    findings: list[Finding] = []
    if delta.is_lora:
        findings.append(
            publisher_finding(
                "adapter_in_delta", ADAPTER_CONFIG_FILE, None, "a file", "none in a delta"
            )
        )
    shards, parents = _by_file(delta), _by_file(previous)
    for file in sorted(parents.keys() - shards.keys()):
        findings.append(
            publisher_finding(
                "missing_shard", file, None, "no such file", "every shard of previous"
            )
        )
    for file in sorted(shards.keys() - parents.keys()):
        findings.append(
            publisher_finding("stray_shard", file, None, "a shard", "only the shards of previous")
        )
    for file in sorted(shards.keys() & parents.keys()):
        findings += check_delta_shard(shards[file], parents[file])
        findings += check_size(file, shards[file].size_bytes)
    for file in _changed_side_files(previous, delta):
        findings.append(
            publisher_finding("side_file", file, None, "other bytes", "the bytes of previous")
        )
    return tuple(findings)


def delta_obstacle(previous: Checkpoint, target: Checkpoint) -> str | None:
    """Say why `target` cannot be a delta on `previous`; None when it can (wire-format §6, protocol
    §18).

    A delta needs the same shards holding the same tensors in the same order, and every other file
    the same: byte-equal, or in its meaning, and then the file of `previous` is published again.
    Shard metadata may differ: the restored shard carries that of `previous`.
    """
    before, after = _by_file(previous), _by_file(target)
    if before.keys() != after.keys():
        return f"shard files changed: {first_names(before.keys() ^ after.keys())}"
    for file in sorted(before):
        if reason := shard_obstacle(before[file], after[file]):
            return reason
    changed = [
        file
        for file in _changed_side_files(previous, target)
        if not _means_same(previous.documents.get(file), target.documents.get(file))
    ]
    if not changed:
        return None
    price = size(sum(shard.size_bytes for shard in target.shards))
    return f"files beside the shards changed: {first_names(changed)}; each time costs {price}"


def _means_same(one: bytes | None, other: bytes | None) -> bool:
    if one is None or other is None:
        return False
    try:
        return means_same(json.loads(one), json.loads(other))
    except (ValueError, RecursionError):
        return False


def _by_file(checkpoint: Checkpoint) -> dict[str, ShardHeader]:
    return {shard.file: shard for shard in checkpoint.shards}


def _changed_side_files(previous: Checkpoint, target: Checkpoint) -> list[str]:
    before = {side.file: side.sha256 for side in previous.side_files}
    after = {side.file: side.sha256 for side in target.side_files}
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))
