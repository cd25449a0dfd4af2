"""Killed at any moment, an implementation leaves no output or a whole one, and its input alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.adapters import Adapter
from tests.conformance.pairs import pair
from tests.conformance.plain import Dress, Tensor, make_delta, read_checkpoint, write_checkpoint
from tests.conformance.test_receivers import digest

ROOT = Path(__file__).parents[2]
TENSORS, TENSOR_BYTES = 6, 4 << 20


def call(adapter: Adapter, verb: str, *operands: object) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "tests.conformance.call", adapter.path.resolve(), verb]
    return subprocess.Popen(
        [str(word) for word in (*program, *operands)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        start_new_session=True,  # commands of a .toml adapter die with their shell
    )


def kill_when_written(child: subprocess.Popen[bytes], directory: Path, size: int) -> None:
    """Kill the child once what is new in `directory` has `size` bytes, if it lives so long."""
    known = {path for path in directory.rglob("*") if path.is_file()}
    while child.poll() is None:
        if written(directory, known) >= size:
            os.killpg(child.pid, signal.SIGKILL)
            break
    child.communicate()


def written(directory: Path, known: set[Path]) -> int:
    """Bytes of what is new, and one for each directory; what is renamed meanwhile counts later."""
    total = 0
    for place, directories, files in os.walk(directory):  # passes over a directory that is gone
        total += len(directories)
        for path in {Path(place, name) for name in files} - known:
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_crash(crash: tuple[Adapter, Dress, str], share: float, tmp_path: Path) -> None:
    adapter, dress, verb = crash
    generator = np.random.default_rng(1)
    tensors = {
        f"model.layers.{number}.w": generator.integers(0, 256, TENSOR_BYTES, np.uint8)
        for number in range(TENSORS)
    }
    before, after = (
        {
            f"model-{number}.safetensors": {name: Tensor("U8", data.shape, (data ^ flip).tobytes())}
            for number, (name, data) in enumerate(tensors.items())
        }
        for flip in (0, 1)
    )
    found = pair(before, after)
    base = write_checkpoint(tmp_path / "base", found.base, found.sides)
    target = write_checkpoint(tmp_path / "target", found.target, found.sides)
    delta = make_delta(dress, found.base, found.target, found.sides).write(tmp_path / "delta")
    inputs = digest(tmp_path)
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "out"
    if verb == "encode":
        operands = [
            base,
            target,
            out,
            dress.dialect,
            dress.checksum,
            dress.version,
            dress.base_version,
        ]
        size = sum(path.stat().st_size for path in delta.iterdir())
    else:
        operands = [base, delta, out]
        size = TENSORS * TENSOR_BYTES
    kill_when_written(call(adapter, verb, *operands), tmp_path / "work", int(size * share) + 1)
    left = digest(out)
    kept = {path: found for path, found in digest(tmp_path).items() if path in inputs}
    assert kept == inputs, "changed its input"
    if not left:
        child = call(adapter, verb, *operands)
        _, told = child.communicate()
        assert child.returncode == 0, told.decode()[-2000:]
    if verb == "apply":
        assert read_checkpoint(out) == found.target
    else:
        assert (out / "model-5.safetensors").is_file() or dress.dialect != "fireworks"
        assert len(list(out.glob("*.safetensors"))) in (1, TENSORS)
