"""One call of an adapter in a process of its own, to be killed: python -m tests.conformance.call

… ADAPTER encode BASE TARGET OUT DIALECT CHECKSUM VERSION BASE_VERSION
… ADAPTER apply BASE DELTA OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.conformance.adapters import load
from tests.conformance.plain import Dress


def main(adapter: str, verb: str, base: str, other: str, out: str, *dress: str) -> None:
    found = load(Path(adapter))
    if verb == "encode":
        found.encode(Path(base), Path(other), Path(out), Dress(*dress))
    else:
        found.apply(Path(base), Path(other), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
