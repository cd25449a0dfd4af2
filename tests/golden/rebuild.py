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
and compares. `vendor/` is recorded from the vendor's package and `losses/` from torch; \
they have READMEs of
their own.

- `v0`, `v1`, `delta`, `delta-hex`: the test vectors of wire-format §10, with the digests printed
  there.
- `fireworks/`, `slime*/`, `coreweave/`: the delta from `base/` to `target/` in every dialect of
  wire-format §3, one tensor of three unchanged; frames of raw blocks and runs.
- `hostile/shard-*`: no reader may accept one as a shard. `hostile/delta-*`: nobody may apply one to
  `v0`. `hostile/index-*`: nobody may follow one as the index of a delta directory. What each must
  be refused for stands in `tests/hotload/test_shards.py`, `test_codec.py` and `test_hostile.py`.

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


def raw_block(content: bytes, *, is_last: bool = True) -> bytes:
    return (is_last | len(content) << 3).to_bytes(3, "little") + content


def run_block(size: int, *, is_last: bool = True) -> bytes:
    return (is_last | 2 | size << 3).to_bytes(3, "little") + b"\0"


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
        "duplicate-metadata": raw(
            '{"__metadata__":{"w":"1","w":"2"},"w":' + json.dumps(W) + "}", V0
        ),
        "metadata-null-value": shard({"__metadata__": {"w": None}, "w": W}, V0),
        "metadata-nested": shard({"__metadata__": {"w": {"adler32": "1"}}, "w": W}, V0),
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
        # 36 bytes that claim a terabyte, and 32 KiB that really hold a gibibyte.
        "states-a-terabyte": delta(
            MAGIC + b"\xe0" + (1 << 40).to_bytes(8, "little") + raw_block(xor)
        ),
        "run-bomb": delta(
            MAGIC
            + b"\xe0"
            + (1 << 30).to_bytes(8, "little")
            + run_block(1 << 17, is_last=False) * 8191
            + run_block(1 << 17)
        ),
        "run-past-the-tensor": delta(MAGIC + b"\x20\x0c" + run_block(1 << 17)),
        "run-of-two-mebibytes": delta(MAGIC + b"\x20\x0c" + run_block((1 << 21) - 1)),
        "blocks-without-end": delta(MAGIC + b"\x20\x0c" + raw_block(b"", is_last=False) * 10_000),
        "many-blocks-then-more": delta(
            MAGIC + b"\x20\x0c" + raw_block(b"", is_last=False) * 10_000 + raw_block(xor + b"\0")
        ),
        "empty-compressed-block": delta(
            MAGIC + b"\x20\x0c" + (4).to_bytes(3, "little") + raw_block(xor)
        ),
        "needs-a-dictionary": delta(MAGIC + b"\x21\x07\x0c" + raw_block(xor)),
        "of-another-base": delta(
            FRAME[:9] + bytes.fromhex("000003000000000000000000"), "479462503"
        ),
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
        **directories(),
        **{f"hostile/shard-{name}.safetensors": data for name, data in hostile_shards.items()},
        **{f"hostile/delta-{name}.safetensors": data for name, data in hostile_deltas.items()},
        **{f"hostile/index-{name}.json": data for name, data in hostile_indexes().items()},
    }


INDEX = "model.safetensors.index.json"
KEPT = bytes.fromhex("0000803f0000c07f00000080")  # 1, a NaN and -0 in F32
# The checksum of V1 in each dialect that tells its lineage, version and base version.
DRESSES = {
    "slime": ("adler32", "1c8a0466", "000001", "000000"),
    "slime-xxh3-128": ("xxh3-128", "125348b0c69f34e6a80c8a462794553a", "000001", "000000"),
    "slime-blake3": (
        "blake3",
        "282e81589f7e216934e448091be0dcd15b8ac37e8d49ec24b9b9c9a307b27f50",
        "000001",
        "000000",
    ),
    "coreweave": ("adler32", "1c8a0466", "run-000001-0badcafe", "run-000000-0badcafe"),
}


def directories() -> dict[str, bytes]:
    """Two checkpoints of two shards, and the delta between them in every dialect."""
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    w, empty, kept = "model.layers.0.w", "model.layers.0.empty", "model.layers.1.kept"
    head = {"__metadata__": {"format": "pt"}}
    entries = {
        first: {w: W, empty: {"dtype": "F16", "shape": [0, 3], "data_offsets": [12, 12]}},
        second: {kept: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    }
    sides = {
        INDEX: {
            "metadata": {"total_size": 24},
            "weight_map": {name: file for file, held in entries.items() for name in held},
        },
        "model.weight.spec.json": {
            "tensor_map": {
                w: {"shape": [2, 3], "dtype": "bfloat16"},
                empty: {"shape": [0, 3], "dtype": "float16"},
                kept: {"shape": [3], "dtype": "float32"},
            }
        },
        "config.json": {"model_type": "llama"},
    }
    files: dict[str, bytes] = {}
    for name, value in (("base", V0), ("target", V1)):
        files[f"{name}/{first}"] = shard({**head, **entries[first]}, value)
        files[f"{name}/{second}"] = shard({**head, **entries[second]}, KEPT)
    for name in ("base", "target", "fireworks"):
        files |= {f"{name}/{file}": json.dumps(side).encode() for file, side in sides.items()}
    nothing, zeros = MAGIC + b"\x20\0" + raw_block(b""), MAGIC + b"\x20\x0c" + run_block(12)
    files[f"fireworks/{first}"] = payloads({w: (FRAME, V1_ADLER32), empty: (nothing, "1")})
    files[f"fireworks/{second}"] = payloads({kept: (zeros, "247333503")})
    for name, (checksum, text, version, base_version) in DRESSES.items():
        index = {
            "metadata": {
                "version": version,
                "base_version": base_version,
                "delta_encoding": "xor",
                "compression_format": "zstd",
                "checksum_format": checksum,
            },
            "weight_map": {w: "model-00000-of-00001.safetensors"},
        }
        files[f"{name}/{INDEX}"] = json.dumps(index).encode()
        files[f"{name}/model-00000-of-00001.safetensors"] = payloads({w: (FRAME, text)})
    return files


def payloads(held: dict[str, tuple[bytes, str]]) -> bytes:
    """A delta shard of these frames and checksum texts."""
    end, entries = 0, {}
    for name, (frame, _) in held.items():
        start, end = end, end + len(frame)
        entries[name] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [start, end]}
    texts = {"__metadata__": {name: text for name, (_, text) in held.items()}}
    return shard({**texts, **entries}, b"".join(frame for frame, _ in held.values()))


def hostile_indexes() -> dict[str, bytes]:
    """Indexes of a delta on v0 in one shard, `model.safetensors`, that holds `w`."""
    told = {
        "version": "000001",
        "base_version": "000000",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    homes = {"w": "model.safetensors"}

    def index(metadata: object = told, weight_map: object = homes) -> bytes:
        return json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()

    def without(key: str) -> bytes:
        return index({name: value for name, value in told.items() if name != key})

    valid = index()
    slash = {
        "parent": "../model.safetensors",
        "sub-directory": "deeper/model.safetensors",
        "absolute": "/model.safetensors",
        "backslash": "..\\model.safetensors",
        "dots": "..",
        "empty": "",
        "nul": "model\0.safetensors",
        "newline": "model\n.safetensors",
        "query": "model.safetensors?versionId=1",
        "long": "m" * 300 + ".safetensors",
        "no-shard": "config.json",
    }
    return {
        "empty": b"",
        "not-json": b"{'weight_map': {}}",
        "not-utf8": b'{"weight_map": {"\xff": "model.safetensors"}}',
        "cut": valid[:-1],
        "list": b"[]",
        "deep": b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        "long-number": b'{"metadata": ' + b"9" * 5000 + b"}",
        "metadata-list": index(["xor"]),
        "metadata-null": index(None),
        "no-weight-map": json.dumps({"metadata": told}).encode(),
        "weight-map-list": index(weight_map=["model.safetensors"]),
        "weight-map-null": index(weight_map=None),
        "file-number": index(weight_map={"w": 7}),
        "file-null": index(weight_map={"w": None}),
        "file-list": index(weight_map={"w": ["model.safetensors"]}),
        "lone-surrogate": valid.replace(b'"w"', b'"\\ud800"'),
        "duplicate-weight-map": valid[:-1] + b', "weight_map": {"w": "model.safetensors"}}',
        "duplicate-tensor": valid.replace(b'"w": ', b'"w": "model.safetensors", "w": '),
        "duplicate-version": valid.replace(b'"version": ', b'"version": "000009", "version": '),
        **{f"file-{name}": index(weight_map={"w": file}) for name, file in slash.items()},
        "encoding-overwrite": index({**told, "delta_encoding": "overwrite"}),
        "encoding-null": index({**told, "delta_encoding": None}),
        "encoding-list": index({**told, "delta_encoding": ["xor"]}),
        "compression-lz4": index({**told, "compression_format": "lz4"}),
        "compression-missing": without("compression_format"),
        "checksum-crc32": index({**told, "checksum_format": "crc32"}),
        "checksum-list": index({**told, "checksum_format": ["adler32"]}),
        "checksum-missing": without("checksum_format"),
        "version-missing": without("version"),
        "base-version-missing": without("base_version"),
        "version-number": index({**told, "version": 1}),
        "version-is-its-base": index({**told, "base_version": "000001"}),
        "version-before-its-base": index({**told, "base_version": "000002"}),
        "version-and-identity": index({**told, "version": "run-000001-0badcafe"}),
        "identity-of-a-path": index({**told, "version": "../up", "base_version": "run-0"}),
        "identity-reserved": index({**told, "version": "latest", "base_version": "run-0"}),
        "identity-signed": index({**told, "version": "+00001", "base_version": "+00000"}),
        "identity-digits": index({**told, "version": "1", "base_version": "0"}),
        "identities-with-blake3": index(
            {**told, "version": "run-1", "base_version": "run-0", "checksum_format": "blake3"}
        ),
    }


def rebuild(directory: Path) -> None:
    rows = []
    for name, data in files().items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
        rows.append(f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    text = README.format(rows="\n".join(rows))
    (directory / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rebuild(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
