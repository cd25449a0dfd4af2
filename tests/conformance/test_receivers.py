"""Every receiver restores what it should, and leaves everything alone when it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.conformance.adapters import Adapter
from tests.conformance.plain import Dress, read_checkpoint, write_checkpoint
from tests.conformance.suite import for_receivers


def digest(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(adapter: Adapter, base: Path, delta: Path, out: Path) -> BaseException | None:
    try:
        adapter.apply(base, delta, out)
    except adapter.refusals as error:
        return error
    return None


def test_receivers(receiving: tuple[Adapter, Dress, str], tmp_path: Path) -> None:
    adapter, dress, name = receiving
    case = for_receivers(dress)[name](dress)
    state = write_checkpoint(tmp_path / "state-0", case.base, case.sides)
    for number, step in enumerate(case.deltas, start=1):
        delta = step.write(tmp_path / f"delta-{number}")
        out = tmp_path / f"state-{number}"
        before = digest(tmp_path)
        error = refusal(adapter, state, delta, out)
        after = digest(tmp_path)
        if error:
            assert number == len(case.deltas), f"refused step {number}: {error!r}"
            assert case.expects != "target", f"refused: {error!r}"
            assert not out.exists(), "refused, and yet wrote an output"
            assert after == before, "refused, and yet changed a file"
            return
        assert {path: after.get(path) for path in before} == before, "changed its input"
        state = out
    assert case.expects != "refused", "accepted"
    assert read_checkpoint(state) == case.target
