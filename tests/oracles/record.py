"""Records what the vendor's encoder writes: .oracle-venv/bin/python -m tests.oracles.record

The header of the vendor's file comes out in another order each time, so a new recording differs;
there is no need for one unless the vendor's package changes.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from fireworks_delta_compression import delta_compress_files_to_file

from tests.oracles.seeded import SMALL, write_pair

SEED = 20
DIRECTORY = Path(__file__).parents[1] / "golden" / "vendor"
README = """\
# Recorded from the vendor's package

- `delta.safetensors`: written by `delta_compress_files_to_file` (format `arc_v2`) of
  `fireworks-delta-compression` {codec}, with torch {torch}, zstd {zstd},
  safetensors {safetensors}.
- `base.safetensors`, `target.safetensors`: our own, seed {seed} of `tests/oracles/seeded.py`.
- Licence: the package is MIT, copyright Fireworks; the recorded bytes hold our numbers only.
- Used by `tests/hotload/test_vendor_fixtures.py`: decodes the delta, encodes the pair again.

`make oracles` compares with the package itself. To record again, in its environment:
`python -m tests.oracles.record`.

| File | Bytes | SHA-256 |
|---|---|---|
{rows}
"""


def record() -> None:
    """Write the three shards and their README."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    base, target = write_pair(DIRECTORY, SEED, SMALL)
    delta = DIRECTORY / "delta.safetensors"
    delta_compress_files_to_file(
        src=str(base), dst=str(target), diff_file=str(delta), compression_format="arc_v2"
    )
    rows = []
    for path in (base, delta, target):
        data = path.read_bytes()
        rows.append(f"| `{path.name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |")
    text = README.format(
        codec=version("fireworks-delta-compression"),
        torch=version("torch").split("+")[0],
        zstd=version("zstd"),
        safetensors=version("safetensors"),
        seed=SEED,
        rows="\n".join(rows),
    )
    (DIRECTORY / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record()
