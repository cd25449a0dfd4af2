"""Every encoder writes what the contract says, and nothing where there is no delta."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.adapters import Adapter
from tests.conformance.encoding import for_encoders
from tests.conformance.plain import Dress, check_delta, write_checkpoint
from tests.conformance.test_receivers import digest


def test_encoders(encoding: tuple[Adapter, Dress, str], tmp_path: Path) -> None:
    adapter, dress, name = encoding
    task = for_encoders(dress)[name]()
    base = write_checkpoint(tmp_path / "base", task.base, task.base_sides)
    target = write_checkpoint(tmp_path / "target", task.target, task.target_sides)
    out, before = tmp_path / "delta", digest(tmp_path)
    if not task.is_possible:
        with pytest.raises(adapter.refusals):
            adapter.encode(base, target, out, dress)
        assert not out.exists(), "refused, and yet wrote an output"
        assert digest(tmp_path) == before, "refused, and yet changed a file"
        return
    adapter.encode(base, target, out, dress)
    assert {path: found for path, found in digest(tmp_path).items() if path in before} == before
    check_delta(out, dress, base, target)
