"""Records what CoreWeave's library writes and restores: .cwtrain-venv/bin/python -m
tests.oracles.record_cwtrain

There is no need for a new recording unless the library changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from cwtrain.hotload import WeightMirror
from cwtrain.hotload.delta import write_delta

from tests.conformance.pairs import PAIRS
from tests.conformance.plain import write_checkpoint

DIRECTORY = Path(__file__).parents[1] / "golden" / "cwtrain"
VERSION, BASE_VERSION = "run-000001-0badcafe", "run-000000-0badcafe"
README = """\
# Recorded from CoreWeave's trainer library

- `delta/`: written by `write_delta` of `cwtrain` {cwtrain}, with zstandard {zstandard}.
- `restored.json`: the manifest of its `WeightMirror` after it applied that delta to `base/`: the
  Adler-32 of every tensor it then holds.
- `base/`, `target/`: our own, pair `dtypes` of `tests/conformance/pairs.py`, its head unchanged.
- Licence: the library is Apache-2.0, copyright CoreWeave; the recorded bytes hold our numbers only.
- Used by `tests/hotload/test_cwtrain_fixtures.py`.

`make conformance` compares with the library itself. To record again, in its environment:
`python -m tests.oracles.record_cwtrain`.

| File | Bytes | SHA-256 |
|---|---|---|
{rows}
"""


def record() -> None:
    """Write the three directories, the manifest and their README."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    pair = PAIRS["dtypes"]()
    base = write_checkpoint(DIRECTORY / "base", pair.base, pair.sides)
    kept = "model-00003-of-00003.safetensors"
    after = pair.target | {kept: pair.base[kept]}
    target = write_checkpoint(DIRECTORY / "target", after, pair.sides)
    delta = DIRECTORY / "delta"
    write_delta(base, target, delta, version=VERSION, base_version=BASE_VERSION)
    with tempfile.TemporaryDirectory() as folder:
        mirror = WeightMirror.create(base, Path(folder) / "mirror", version=BASE_VERSION)
        mirror.apply_delta(delta)
        manifest = mirror.manifest(VERSION)
    (DIRECTORY / "restored.json").write_text(json.dumps(manifest, indent=1) + "\n")
    rows = []
    for path in sorted(path for path in DIRECTORY.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = path.relative_to(DIRECTORY).as_posix()
        rows.append(f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    versions = {name: version(name) for name in ("cwtrain", "zstandard")}
    text = README.format(rows="\n".join(rows), **versions)
    (DIRECTORY / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record()
