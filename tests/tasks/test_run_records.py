"""The history of a run: kept in one small file, made again from reports, and told by a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hotload.__main__ import main
from hotload.clients.store import Store
from hotload.clients.store.run_records import (
    add_missing,
    read_history,
    read_unfinished,
    write_history,
)
from hotload.identity import SnapshotKind
from hotload.publish.publication import ServedSnapshot
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport
from hotload.report.run_history import RunHistory, RunVersion
from hotload.rollout.counts import RolloutSummary

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>\x1b[31m"
STORE = "_hotload"


def report(version: int, run: str = "run") -> CycleReport:
    identity = f"{run}-{version:06d}-0123abcd"
    return CycleReport(
        name=f"{run}-{version:06d}",
        policy_version=version,
        content_sha256="0" * 64,
        outcome="published",
        snapshot=ServedSnapshot(
            identity=identity,
            policy_version=version,
            kind=SnapshotKind.FULL,
            previous=None,
            reason=EVIL,
            size_bytes=100,
            content_size_bytes=100,
            replica_count=2,
        ),
        rollouts=RolloutSummary(
            identity=identity, group_count=1, sample_count=2, mean_reward=0.5, seconds=3
        ),
        seconds=9,
    )


def manifest(version: int) -> SnapshotManifest:
    identity = f"run-{version:06d}-0123abcd"
    return SnapshotManifest(
        identity=identity, run_id="run", policy_version=version, kind="full", previous=None,
        anchor=identity, chain_length=0, attempt=0, reason="", content_sha256="0" * 64,
        codec="none", checksum="none", shards=(), side_files=(), created_at=datetime.now(UTC),
    )  # fmt: skip


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A store after three cycles of `run`, one of another run, and a fourth under way."""
    root = tmp_path / "bucket"
    for name in ("reports", "metrics", "snapshots"):
        (root / STORE / name).mkdir(parents=True)
    for made in (report(1), report(2), report(3), report(7, "run-000001")):
        (root / STORE / "reports" / f"{made.name}.json").write_text(made.model_dump_json())
        (root / STORE / "reports" / f"{made.name}.html").write_text("a page")
    last = {"at": "2026-01-02T03:04:05+00:00", "rollout/reward_std": 0.25}
    (root / STORE / "metrics/run-000002.jsonl").write_text(f"{{}}\n{json.dumps(last)}\n")
    for version in (3, 4):
        path = root / STORE / f"snapshots/run-{version:06d}-0123abcd.json"
        path.write_bytes(manifest(version).render())
    return root


@pytest.fixture
def store(bucket: Path) -> Store:
    return Store(bucket.as_uri())


def versions(history: RunHistory) -> list[int]:
    return [row.policy_version for row in history.versions]


async def test_rows_are_made_from_reports_and_metrics(store: Store) -> None:
    history, unreadable = await add_missing(store, RunHistory(run_id="run"))
    assert versions(history) == [1, 2, 3]
    assert [row.reward_std for row in history.versions] == [None, 0.25, None]
    assert unreadable == []
    (unfinished,) = await read_unfinished(store, history)
    assert unfinished.policy_version == 4


async def test_what_a_new_line_has_begun_is_unfinished(store: Store, bucket: Path) -> None:
    begun = "run-000002.1-0123abcd"
    made = manifest(2).model_copy(update={"identity": begun, "anchor": begun})
    (bucket / STORE / f"snapshots/{begun}.json").write_bytes(made.render())
    history, _ = await add_missing(store, RunHistory(run_id="run"))
    found = await read_unfinished(store, history)
    assert [one.identity for one in found] == ["run-000004-0123abcd", begun]
    (bucket / STORE / "reports/run-000002.1.json").write_text(
        report(2).model_copy(update={"name": "run-000002.1"}).model_dump_json()
    )
    history, unreadable = await add_missing(store, history)
    assert ([row.order for row in history.versions][-2:], unreadable) == ([(0, 3), (1, 2)], [])
    assert await read_unfinished(store, history) == ()


async def test_a_cycle_reads_the_rows_that_are_kept_and_only_few_reports(
    store: Store, bucket: Path
) -> None:
    history, _ = await add_missing(store, RunHistory(run_id="run"), limit=1)
    assert versions(history) == [3]  # the newest first
    await write_history(store, history, "a page")
    for path in (bucket / STORE / "reports").glob("*.json"):
        path.write_text("damaged")  # as nobody reads it again
    kept = await read_history(store, "run")
    assert kept == history
    again, unreadable = await add_missing(store, kept)
    assert again == history
    assert unreadable == ["run-000001", "run-000002"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", '{"run_id": "other"}', '{"run_id": "run", "x": 1}']
)
async def test_rows_that_are_damaged_are_made_again(
    store: Store, bucket: Path, damage: str
) -> None:
    assert versions(await read_history(store, "run")) == []
    (bucket / STORE / "runs").mkdir()
    (bucket / STORE / "runs/run.json").write_text(damage)
    kept = await read_history(store, "run")
    assert kept == RunHistory(run_id="run")
    history, _ = await add_missing(store, kept)
    assert versions(history) == [1, 2, 3]


async def test_a_row_that_another_cycle_overwrote_comes_back(store: Store) -> None:
    mine, others = RunVersion.of(report(1), {}), RunVersion.of(report(2), {})
    await write_history(store, RunHistory(run_id="run").adding([mine]), "a page")
    await write_history(store, RunHistory(run_id="run").adding([others]), "a page")
    history, _ = await add_missing(store, await read_history(store, "run"))
    assert versions(history) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"run-000002"', '"run-000009"'),
        lambda text: text.replace('"policy_version":2', '"policy_version":5', 1),
        lambda text: text.replace('"size_bytes":100', f'"size_bytes":{10**400}'),
        lambda text: text.replace('"identity":"', f'"identity":"{"x" * 200}'),
        lambda text: text.ljust(5 << 20),
        lambda text: text[:-9],
    ],
)
async def test_a_hostile_report_is_left_out_and_named(
    store: Store, bucket: Path, change: Callable[[str], str]
) -> None:
    path = bucket / STORE / "reports/run-000002.json"
    text = change(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    history, unreadable = await add_missing(store, RunHistory(run_id="run"))
    assert (versions(history), unreadable) == ([1, 3], ["run-000002"])


async def test_a_damaged_manifest_or_metrics_file_costs_only_what_it_tells(
    store: Store, bucket: Path
) -> None:
    (bucket / STORE / "snapshots/run-000004-0123abcd.json").write_text("{")
    (bucket / STORE / "metrics/run-000002.jsonl").write_text("{}\n{")
    history, unreadable = await add_missing(store, RunHistory(run_id="run"))
    assert (versions(history), unreadable) == ([1, 2, 3], [])
    assert history.versions[1].reward_std is None
    assert await read_unfinished(store, history) == ()


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["report", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_writes_the_page_of_a_run(
    bucket: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told, _ = run(capsys, bucket.as_uri(), "run")
    assert (code, told) == (0, "run.html: 3 versions of run, served run-000003-0123abcd\n")
    page = (tmp_path / "run.html").read_text()
    assert "0.250" in page
    assert "cycle not ended" in page
    assert not list(bucket.rglob("runs"))  # the store is only read

    (bucket / STORE / "reports/run-000002.json").write_text("{")
    code, told, noted = run(capsys, "bucket", "run", "--out", "mine.html", "--json")
    assert json.loads(told)["unreadable"] == ["run-000002"]
    assert json.loads(told)["version_count"] == 2
    assert (tmp_path / "mine.html").read_text() != page
    code, _, noted = run(capsys, "bucket", "run")
    assert noted == "hotload report: the page is without run-000002: its report is damaged\n"
    assert (tmp_path / "run.html").read_text() == (tmp_path / "mine.html").read_text()


def test_a_run_that_is_not_there_is_answered_with_those_that_are(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "page.html")
    code, _, noted = run(capsys, str(bucket), "ruin", "--out", out)
    assert code == 2
    assert "no ended cycle of run 'ruin', expected one of 2: run, run-000001 [caller acts]" in noted
    for path in (bucket / STORE / "reports").iterdir():
        path.unlink()
    code, _, noted = run(capsys, str(bucket), "run", "--out", out)
    assert "expected a store where a cycle has ended" in noted
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("url", "name", "code", "said"),
    [
        ("ftp://x", "run", 2, "unknown scheme 'ftp': expected file, memory, s3, gs [caller acts]"),
        ("nowhere", "run", 3, "the directory does not exist"),
        ("nowhere", "../run", 2, "found '../run', expected the name of a run [caller acts]"),
        ("s3://key:secret@x", "run", 2, "expected no user or password in the url"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    url: str, name: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, told, noted = run(capsys, url, name)
    assert (ended, told) == (code, "")
    assert said in noted
    assert "secret" not in noted
    assert noted.count("\n") == 1


@pytest.mark.parametrize("package", ["fsspec", "jinja2"])
@pytest.mark.slow
def test_a_package_that_is_missing_is_named_with_its_extra(package: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from hotload.__main__ import main\n"
        "sys.exit(main(['report', 'memory://x', 'run']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"the package '{package}' is not installed" in ended.stderr
    assert 'pip install "hotload[clients]"' in ended.stderr
    assert ended.stderr.count("\n") == 1
