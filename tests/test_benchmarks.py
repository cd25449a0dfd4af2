"""The data of the codec's benchmark is what it says it is, and the benchmarks run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoints, swaps
from benchmarks.peers import Plain, Sparse
from hotload.rollout.counts import GroupCounts, RolloutSummary
from hotload.training.policy_loss import PARAMETERS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("title", checkpoints.RECIPES)
def test_a_data_set_follows_from_its_seed_and_changes_as_much_as_it_says(title: str) -> None:
    changes = checkpoints.make(title, seed=1, is_quick=True)
    again = checkpoints.make(title, seed=1, is_quick=True)
    assert [one.name for one in changes] == [one.name for one in again]
    for one, other in zip(changes, again, strict=True):
        assert np.array_equal(one.old, other.old)
        assert np.array_equal(one.new, other.new)
    least, most = checkpoints.RECIPES[title].changed_percent
    assert least <= checkpoints.changed_percent(changes) <= most


def test_another_seed_gives_other_weights() -> None:
    first, second = (
        checkpoints.make("bf16, lr 1e-6", seed=seed, is_quick=True)[1] for seed in (1, 2)
    )
    assert np.count_nonzero(first.old != second.old) > 0.9 * first.old.size


def test_most_changes_are_by_one_unit_in_the_last_place() -> None:
    change = checkpoints.make("bf16, lr 1e-6", is_quick=True)[1]
    moved = change.old != change.new
    steps = np.abs(change.old[moved].astype(np.int32) - change.new[moved].astype(np.int32))
    assert 0.83 <= np.mean(steps == 1) <= 0.95


def test_bf16_rounds_to_nearest_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF], np.uint32)
    assert checkpoints.bfloat16(halfway.view(np.float32)).tolist() == [
        *(0x3F80, 0x3F82, 0x3F81, 0xBF81)
    ]


def test_e4m3_takes_the_nearest_of_its_values() -> None:
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    assert sizes[-1] == checkpoints.FP8_LARGEST
    random = np.random.default_rng(0)
    values = random.uniform(-1, 1, 4000) * 448.0 ** random.uniform(-1.5, 1, 4000)
    found = checkpoints.float8_e4m3(values.astype(np.float32))
    restored = np.where(found & 0x80, -1, 1) * sizes[found & 0x7F]
    nearest = np.abs(np.abs(values)[:, None] - sizes).min(axis=1)
    assert np.allclose(np.abs(restored - values), nearest, atol=1e-6)


@pytest.mark.parametrize("way", [Plain, Sparse])
def test_peers_restore_what_they_encoded(way: type[Plain] | type[Sparse]) -> None:
    changes = checkpoints.make("fp8 e4m3 with scales, lr 1.5e-5", is_quick=True)
    made = way(changes)
    assert 0 < made.encode() < sum(one.new.nbytes for one in changes) / 10
    for change, tensor in zip(changes, made.decode(), strict=True):
        assert tensor.tobytes() == change.new.tobytes()


def test_the_quick_benchmark_prints_every_bar() -> None:
    command = [sys.executable, "-m", "benchmarks.codec", "--quick", "--repetitions", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tables = re.findall(r"(?:^\|.*\n)+", run.stdout, re.MULTILINE)
    _, bars, memory, *disk = ([line.split(" | ") for line in one.splitlines()] for one in tables)
    assert {line[3] for line in bars[2:]} <= {"met", "**not met**"}
    assert len(bars) == 2 + 9
    found = {(data, way): float(ratio) for data, _, way, ratio, *_ in _rows(memory)}
    for data in {data for data, _ in found}:
        assert found[data, "hotload, sequences"] > found[data, "XOR + zstd 1"] > 10
    assert [len(_rows(one)) for one in disk] == [4, 1, 9]


@pytest.mark.parametrize("name", ["whole_path", "rollout_memory"])
def test_benchmarks_of_rollouts_run(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--problems", "6", "--samples", "2"]
    run = subprocess.run([*command, "--tokens", "8"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "12 samples" in run.stdout


def test_swaps_names_the_count_that_is_not_equal(capsys: pytest.CaptureFixture[str]) -> None:
    """Two samples: one refused and cut before it was answered, one made by two versions."""
    who = {"identity_first": "a", "identity_last": "a", "completion_tokens": 4}
    log = [{"session": "s", "status": status, **who} for status in (429, 499, 200)]
    log.append({"session": "t", "status": 200, **who, "identity_last": "b"})
    met = {"429": 1, "truncated": 1}
    told = RolloutSummary(
        identity="a",
        group_count=1,
        sample_count=2,
        samples_by_identity={"a": 1, "a → b": 1},
        completion_token_count=8,
        groups=GroupCounts(attempts=4, failed_attempts=met, straddling_samples=1),
    )
    assert swaps.table("v", swaps.of_report(told), swaps.of_log(log)) == []
    other = told.groups.model_copy(update={"failed_attempts": {"503": 1, "connection": 1}})
    wrong = swaps.of_report(told.model_copy(update={"groups": other}))
    assert swaps.table("v", wrong, swaps.of_log(log)) == [
        "v: refused 429: 0 reported, 1 log",
        "v: refused 503: 1 reported, 0 log",
    ]
    assert re.search(r"refused 429 +0 +1  ≠", capsys.readouterr().out)
    assert swaps.total([swaps.of_log(log[:3]), swaps.of_log(log[3:])])["requests sent"] == 4
    assert swaps.table("m", {"425": 3}, {"425": 2}, against="ordered", or_more="425") == []
    assert swaps.table("m", {"425": 1}, {"425": 2}, against="ordered", or_more="425")


def _rows(table: list[list[str]]) -> list[list[str]]:
    return [[cell.strip("| ") for cell in line] for line in table[2:]]


def test_the_benchmark_of_losses_times_every_loss() -> None:
    command = [sys.executable, "-m", "benchmarks.losses", "--tokens", "2000"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^\| (\w+) \| \d+ ms", run.stdout, re.MULTILINE) == list(PARAMETERS)
    assert run.stdout.endswith("met\n")


def test_the_benchmark_of_ranks_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.ranks", "--quick", "--layers", "1", "--turns", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"of the codec's in-memory encode: \d\.\d\d by wall", run.stdout)


def test_the_benchmark_of_agents_runs() -> None:
    small = [
        "--layers",
        "1",
        "--turns",
        "1",
        "--swaps",
        "2",
        "--agents",
        "4",
        "--fleet-layers",
        "1",
    ]
    command = [sys.executable, "-m", "benchmarks.agents", "--quick", *small]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"the codec's apply \d\.\d\d s: \d+\.\d\d", run.stdout)
    assert len(re.findall(r"p50 \d+\.\d ms, p99 \d+\.\d ms", run.stdout)) == 2
    reads = re.findall(r"peers (on |off).*each read (\d+) to (\d+) times", run.stdout)
    assert reads == [("off", "4", "4")] * 4 + [("on ", "1", "1")] * 4
