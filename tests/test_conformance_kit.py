"""The kit itself: it finds what is wrong, a file of commands plugs in, the cases export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conformance.adapters import DRESSES
from tests.conformance.export import export
from tests.conformance.suite import for_receivers

ROOT = Path(__file__).parents[1]
# Believes every delta, writes where it will stay, and lets its frames not tell their size.
CARELESS = """
import shutil
import zstandard
from tests.conformance.plain import *

READS = WRITES = ("fireworks/adler32",)

def encode(base, target, out, dress):
    shutil.copytree(base, out)
    def streamed(content):
        stream = zstandard.ZstdCompressor(level=1).compressobj()
        return stream.compress(content) + stream.flush()
    sides = {p.name: p.read_bytes() for p in base.iterdir() if p.suffix != SUFFIX}
    states = read_checkpoint(base), read_checkpoint(target)
    make_delta(dress, *states, sides, frame=streamed).write(out)

def apply(base, delta, out):
    shutil.copytree(base, out)
    for path in out.glob("*.safetensors"):
        changes = read_shard(delta / path.name)[0]
        shard = {}
        for name, old in read_shard(path)[0].items():
            xored = xor(old.data, unzip(changes[name].data))
            shard[name] = Tensor(old.dtype, old.shape, xored)
        path.write_bytes(render_shard(shard, {"format": "pt"}))
"""


def run_kit(adapter: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tests.conformance", adapter, "--tb=no", "-rA", *options]
    return subprocess.run(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_careless_implementation_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(CARELESS)
    accepted = ["round-trip/special-values"]
    caught = [
        *("envelope/wrong-checksum", "chain/applied-twice", "chain/wrong-parent"),
        *("frames/truncated", "frames/flipped-bit", "envelope/no-checksum"),
        *("encode/dtypes", "drift/other-config", "drift/tensor-added"),
    ]
    names = [f"{case}-fireworks" for case in accepted + caught]
    run = run_kit(tmp_path / "careless.py", "-k", " or ".join(names))
    assert run.returncode == 1
    verdicts = {
        line.split()[1].split("[careless-")[1].removesuffix("-fireworks/adler32]"): line.split()[0]
        for line in run.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED"))
    }
    assert verdicts == dict.fromkeys(accepted, "PASSED") | dict.fromkeys(caught, "FAILED")


def test_a_file_of_commands_plugs_in(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'reads = ["fireworks/adler32"]\n'
        'apply = "{python} -m hotload apply {base} {delta} {out}"\n'
        "[deviations]\n"
        '"frames/truncated" = "said to be accepted, and is not"\n'
    )
    run = run_kit(tmp_path / "mine.toml", "-k", "round-trip/scalar or frames/truncated-half")
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout
    run = run_kit(tmp_path / "mine.toml", "-k", "frames/truncated-fireworks")
    assert run.returncode == 1
    assert "1 failed" in run.stdout  # a deviation that is none


def test_the_cases_export(tmp_path: Path) -> None:
    export(tmp_path / "cases", DRESSES[:1])
    cases = json.loads((tmp_path / "cases" / "cases.json").read_text())
    receivers = [case for case in cases if case["path"].startswith("receivers/")]
    assert len(receivers) == len(for_receivers(DRESSES[0]))
    for case in cases:
        assert (tmp_path / "cases" / case["path"]).is_dir()
    for case in receivers:
        delta = tmp_path / "cases" / case["path"] / f"delta-{case['deltas']}"
        assert delta.is_dir()
