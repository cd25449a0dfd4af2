"""Lossless deltas between two shards: XOR, then zstd (wire-format §1, §2, §4).

A delta shard holds, for each tensor of its base shard, one zstd frame over `target XOR base`,
stored as a `U8` vector; the frame states its content size and nothing follows it. `__metadata__`
maps each tensor to the checksum of its target bytes, spelled as the envelope says.

Nothing below opens a file: shards come in as `Readable`, outputs as `Writable`. Work goes in pieces
of 2 MiB that stay in the cache, and memory grows with the threads, not with a tensor. An
output is complete only once the function that writes it has returned; `hotload.directory.files`
throws it away otherwise.

`encode` makes deltas, `apply` uses them, `frame` is one payload.
"""

from hotload.delta.apply import Payload, apply_shard, decode_tensor, payloads, verify_shard
from hotload.delta.encode import DeltaStats, TensorDelta, encode_shard, encode_tensor

__all__ = [
    "DeltaStats",
    "Payload",
    "TensorDelta",
    "apply_shard",
    "decode_tensor",
    "encode_shard",
    "encode_tensor",
    "payloads",
    "verify_shard",
]
