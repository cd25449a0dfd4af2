"""Writes the golden files: python tests/golden/rebuild.py [DIRECTORY]

Built by hand from the standard library, so that nothing here shares a mistake with hotload.
`git diff` after a run shows whether a file would change; the vendor's recording beside them has a
script of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

V0 = bytes.fromhex("803f80bf233c00007f7fcc3d")
V1 = bytes.fromhex("803f81bf233c00007e7fcd3d")
V1_ADLER32 = "478807142"
FRAME = bytes.fromhex("28b52ffd200c610000000001000000000001000100")
MAGIC = FRAME[:4]
W = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}

README = """\
# Golden files

Written by `python -m tests.golden.rebuild`, by hand from the standard library; a test rebuilds them
and compares. `vendor/` is recorded from the vendor's package and has a README of its own.

- `v0`, `v1`, `delta`, `delta-hex`: the test vectors of wire-format §10, with the digests printed
  there.
- `hostile/shard-*`: no reader may accept one as a shard. `hostile/delta-*`: nobody may apply one to
  `v0`. What each must be refused for stands in `tests/hotload/test_shards.py` and `test_codec.py`.

| File | Bytes | SHA-256 |
|---|---|---|
{rows}
"""


def raw(header: str | bytes, data: bytes = b"", *, pad: bool = True) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    text = text.ljust(-(-len(text) // 8) * 8) if pad else text
    return len(text).to_bytes(8, "little") + text + data


def shard(entries: object, data: bytes = b"") -> bytes:
    return raw(json.dumps(entries, separators=(",", ":")), data)


def delta(payload: bytes, checksum: object = V1_ADLER32, **changes: object) -> bytes:
    metadata = {} if checksum is None else {"__metadata__": {"w": checksum}}
    entry = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    return shard({**metadata, "w": {**entry, **changes}}, payload)


def raw_block(content: bytes) -> bytes:
    return (1 | len(content) << 3).to_bytes(3, "little") + content


def files() -> dict[str, bytes]:
    xor = bytes(a ^ b for a, b in zip(V0, V1, strict=True))
    pt = {"__metadata__": {"format": "pt"}}
    two = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
    }
    overlap = {**two, "b": {**two["b"], "data_offsets": [2, 6]}}
    gap = {**two, "b": {**two["b"], "data_offsets": [6, 10]}}
    hostile_shards = {
        "empty": b"",
        "seven-bytes": b"\x08" + bytes(6),
        "huge-header": (90_000_000).to_bytes(8, "little") + b"{" + bytes(91),
        "absurd-header": (1 << 63).to_bytes(8, "little") + b"{}",
        "not-an-object": raw("[]"),
        "leading-space": raw(" {}"),
        "not-json": raw("{'w':1}"),
        "not-utf8": raw(b'{"\xff":1}'),
        "lone-surrogate": raw('{"\\ud800":' + json.dumps(W) + "}", V0),
        "deep": raw('{"__metadata__":' + "[" * 20_000 + "]" * 20_000 + "}"),
        "deep-enough": raw('{"__metadata__":' + "[" * 200 + "]" * 200 + "}"),
        "long-number": raw('{"w":' + "9" * 5000 + "}"),
        "nan-shape": raw('{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"\0"),
        "duplicate-tensor": raw('{"w":' + json.dumps(W) + ',"w":' + json.dumps(W) + "}", V0),
        "duplicate-field": raw(
            '{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0"
        ),
        "metadata-number": shard({"__metadata__": {"step": 3}, "w": W}, V0),
        "metadata-list": shard({"__metadata__": ["pt"], "w": W}, V0),
        "entry-is-a-list": shard({"w": []}),
        "entry-without-shape": shard({"w": {"dtype": "U8", "data_offsets": [0, 0]}}),
        "unknown-dtype": shard({"w": {**W, "dtype": "BF15"}}, V0),
        "dtype-is-a-list": shard({"w": {**W, "dtype": []}}, V0),
        "negative-shape": shard({"w": {**W, "shape": [-2, -3]}}, V0),
        "boolean-shape": shard(
            {"w": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"\0"
        ),
        "float-shape": shard({"w": {**W, "shape": [2.0, 3]}}, V0),
        "product-overflow": shard({"w": {**W, "shape": [1 << 40, 1 << 40, 0]}}, V0),
        "half-a-byte": shard({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"\0\0"),
        "size-mismatch": shard({"w": {**W, "shape": [2, 4]}}, V0),
        "reversed-offsets": shard({"w": {**W, "data_offsets": [12, 0]}}, V0),
        "three-offsets": shard({"w": {**W, "data_offsets": [0, 12, 12]}}, V0),
        "beyond-the-file": shard({"w": W}, V0[:11]),
        "trailing-byte": shard({"w": W}, V0 + b"\0"),
        "overlap": shard(overlap, bytes(6)),
        "gap": shard(gap, bytes(10)),
        "late-start": shard({"a": {**two["a"], "data_offsets": [1, 5]}}, bytes(5)),
    }
    hostile_deltas = {
        "two-frames": delta(FRAME + FRAME),
        "second-frame-empty": delta(FRAME + bytes.fromhex("28b52ffd2000010000")),
        "skippable-after": delta(FRAME + bytes.fromhex("502a4d1800000000")),
        "skippable-first": delta(bytes.fromhex("502a4d1800000000") + FRAME),
        "trailing-byte": delta(FRAME + b"\0"),
        "no-content-size": delta(MAGIC + b"\0\0" + raw_block(xor)),
        "states-2-gib": delta(MAGIC + b"\xe0" + (1 << 31).to_bytes(8, "little") + raw_block(xor)),
        "states-less": delta(MAGIC + b"\x20\x0b" + raw_block(xor)),
        "holds-less": delta(MAGIC + b"\x20\x0c" + raw_block(xor[:11])),
        "holds-more": delta(MAGIC + b"\x20\x0c" + raw_block(xor + b"\0")),
        "wide-window": delta(MAGIC + b"\x80\x90\x0c\0\0\0" + raw_block(xor)),
        "truncated": delta(FRAME[:-1]),
        "truncated-header": delta(FRAME[:5]),
        "no-last-block": delta(FRAME[:6] + b"\x60" + FRAME[7:]),
        "reserved-block": delta(FRAME[:6] + b"\x67" + FRAME[7:]),
        "bad-checksum-flag": delta(MAGIC + b"\x24\x0c" + raw_block(xor) + bytes(4)),
        "garbage": delta(bytes(range(21))),
        "empty": delta(b""),
        "wrong-adler": delta(FRAME, "478807143"),
        "hex-adler": delta(FRAME, "1c8a0466"),
        "padded-adler": delta(FRAME, "0478807142"),
        "signed-adler": delta(FRAME, "+478807142"),
        "large-adler": delta(FRAME, "4773774438"),
        "no-checksum": delta(FRAME, None),
        "other-key": delta(FRAME).replace(b'"w":{', b'"v":{'),
        "no-tensor": shard({"__metadata__": {"w": V1_ADLER32}}),
        "not-u8": delta(FRAME, dtype="I8"),
        "two-dimensions": delta(FRAME, shape=[3, 7]),
    }
    return {
        "v0.safetensors": shard({**pt, "w": W}, V0),
        "v1.safetensors": shard({**pt, "w": W}, V1),
        "delta.safetensors": delta(FRAME),
        "delta-hex.safetensors": delta(FRAME, "1c8a0466"),
        **{f"hostile/shard-{name}.safetensors": data for name, data in hostile_shards.items()},
        **{f"hostile/delta-{name}.safetensors": data for name, data in hostile_deltas.items()},
    }


def rebuild(directory: Path) -> None:
    rows = []
    (directory / "hostile").mkdir(parents=True, exist_ok=True)
    for name, data in files().items():
        (directory / name).write_bytes(data)
        rows.append(f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    text = README.format(rows="\n".join(rows))
    (directory / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rebuild(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
