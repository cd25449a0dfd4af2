"""`cwtrain` 1.0.2, CoreWeave's trainer library: runs in `.cwtrain-venv` (Python 3.12 or newer).

Its mirror is stateful: it is made at the version the delta follows, so that the refusals here are
those of the bytes, not of the version counter.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cwtrain.hotload import WeightMirror
from cwtrain.hotload.delta import write_delta
from cwtrain.hotload.snapshot import load_index

from tests.conformance.plain import Dress

READS = WRITES = ("coreweave/adler32", "slime/adler32")
DEVIATIONS = {
    "robustness/overlapping-offsets": "looks only at the header entries that the index names",
}


def encode(base: Path, target: Path, out: Path, dress: Dress) -> None:
    write_delta(base, target, out, version=dress.version, base_version=dress.base_version)


def apply(base: Path, delta: Path, out: Path) -> None:
    version = load_index(delta)["metadata"].get("base_version", "0")
    root = out.with_name(f".{out.name}.mirror")
    try:
        mirror = WeightMirror.create(base, root, version=version)
        mirror.apply_delta(delta)
        for name in ("mirror-state.json", "mirror-checksums.json"):
            (root / name).unlink()
        root.rename(out)
    finally:
        shutil.rmtree(root, ignore_errors=True)
