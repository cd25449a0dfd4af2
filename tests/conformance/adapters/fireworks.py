"""The vendor's own package, `fireworks-delta-compression` 0.1.0: runs in `.oracle-venv`.

It knows shards, not directories, and changes its base in place: walking and copying are ours, as
the original leaves both to its caller.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import fireworks_delta_compression as vendor

from tests.conformance.adapters import complete
from tests.conformance.plain import Dress

READS = WRITES = ("fireworks/adler32",)
SUFFIX = ".safetensors"
DEVIATIONS = {
    "drift/other-config": "looks at shards only",
    "drift/other-tokenizer": "looks at shards only",
    "envelope/other-index": "reads no index",
    "robustness/offsets-beyond-the-file": "takes what there is of such a payload",
    **dict.fromkeys(
        (
            "robustness/shard-above-the-directory",
            "robustness/shard-by-absolute-path",
            "robustness/shard-name-with-nul",
            "robustness/shard-name-empty",
            "robustness/shard-is-a-number",
            "robustness/index-is-no-json",
            "robustness/index-is-a-list",
            "robustness/index-is-not-utf8",
            "robustness/index-nested-deeply",
            "robustness/index-without-weight-map",
            "robustness/weight-map-is-a-list",
        ),
        "reads no index",
    ),
}


def encode(base: Path, target: Path, out: Path, dress: Dress) -> None:
    with complete(out) as staged:
        staged.mkdir()
        for path in base.iterdir():
            if path.suffix != SUFFIX:
                shutil.copy(path, staged)
                continue
            vendor.delta_compress_files_to_file(
                src=str(path),
                dst=str(target / path.name),
                diff_file=str(staged / path.name),
                compression_format="arc_v2",
            )


def apply(base: Path, delta: Path, out: Path) -> None:
    with complete(out) as staged:
        shutil.copytree(base, staged)
        for path in sorted(staged.glob(f"*{SUFFIX}")):
            vendor.delta_decompress_inplace(
                base_path=str(path),
                diff_path=str(delta / path.name),
                compression_format="arc_v2",
            )
