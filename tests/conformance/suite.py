"""Every case by its name: `group/case`."""

from __future__ import annotations

from tests.conformance.cases import CHAIN, Build, of_pair
from tests.conformance.envelope import ADLER_ONLY, ENVELOPE, FIREWORKS_ONLY, INDEXED_ONLY
from tests.conformance.files import LAYOUT, ROBUSTNESS
from tests.conformance.frames import FRAMES
from tests.conformance.pairs import PAIRS
from tests.conformance.plain import Dress


def for_receivers(dress: Dress) -> dict[str, Build]:
    """What a receiver of this dress is handed."""
    envelope = ENVELOPE | (FIREWORKS_ONLY if dress.dialect == "fireworks" else INDEXED_ONLY)
    groups = {
        "round-trip": {name: of_pair(make) for name, make in PAIRS.items()},
        "frames": FRAMES,
        "envelope": envelope | (ADLER_ONLY if dress.checksum == "adler32" else {}),
        "chain": CHAIN,
        "layout": LAYOUT,
        "robustness": ROBUSTNESS,
    }
    return {
        f"{group}/{name}": build for group, found in groups.items() for name, build in found.items()
    }
