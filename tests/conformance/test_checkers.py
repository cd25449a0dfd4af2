"""A check before publishing lets through what may be published, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.adapters import Adapter
from tests.conformance.checking import MAY_BE_PUBLISHED, MAY_NOT


def test_checkers(checking: tuple[Adapter, str], tmp_path: Path) -> None:
    adapter, name = checking
    assert adapter.check
    (MAY_BE_PUBLISHED | MAY_NOT)[name](tmp_path / "checkpoint")
    if name in MAY_BE_PUBLISHED:
        adapter.check(tmp_path / "checkpoint")
    else:
        with pytest.raises(adapter.refusals):
            adapter.check(tmp_path / "checkpoint")
