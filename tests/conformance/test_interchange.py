"""What one implementation on trial writes, each of them restores."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.adapters import Adapter
from tests.conformance.pairs import PAIRS
from tests.conformance.plain import Dress, read_checkpoint, write_checkpoint


def test_interchange(interchange: tuple[Adapter, Adapter, Dress, str], tmp_path: Path) -> None:
    encoder, receiver, dress, name = interchange
    pair = PAIRS[name]()
    base = write_checkpoint(tmp_path / "base", pair.base, pair.sides)
    target = write_checkpoint(tmp_path / "target", pair.target, pair.sides)
    encoder.encode(base, target, tmp_path / "delta", dress)
    receiver.apply(base, tmp_path / "delta", tmp_path / "restored")
    assert read_checkpoint(tmp_path / "restored") == pair.target
