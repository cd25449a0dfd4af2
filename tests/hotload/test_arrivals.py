"""Checkpoints that appear: complete, half-written, torn, named in other ways, gone again."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from hotload.checkpoint.names import INDEX_FILE
from hotload.directory.arrivals import Arrival, find_arrivals, strangers_among, to_publish
from hotload.errors import InvalidCheckpointError
from hotload.spec import WatchSpec

CYCLE = {
    "checkpoint": "/checkpoints/run/000001",
    "run_id": "run",
    "policy_version": 1,
    "work_dir": "/w",
    "problems": {"dataset": "/d"},
}
NAME = re.compile(WatchSpec.model_validate({"cycle": CYCLE}).name)
LATER = 4e9
GOLDEN = Path(__file__).parents[1] / "golden"


def look(parent: Path, *, marker: str | None = None, now: float = LATER) -> tuple[Arrival, ...]:
    return find_arrivals(parent, NAME, after=None, marker=marker, still_seconds=5, now=now)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of two shards and an index, among others."""
    for name in ("checkpoint-12", "000013"):
        (tmp_path / name).mkdir()
        for shard in ("a.safetensors", "b.safetensors"):
            shutil.copy(GOLDEN / "v0.safetensors", tmp_path / name / shard)
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (tmp_path / name / INDEX_FILE).write_text(json.dumps(index))
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes-7").write_text("a file")
    return tmp_path / "checkpoint-12"


def test_versions_are_read_from_names_in_their_order(written: Path) -> None:
    found = look(written.parent)
    assert [(one.version, one.directory.name) for one in found] == [
        (12, "checkpoint-12"),
        (13, "000013"),
    ]
    assert not any(one.waits_for for one in found)


def test_names_are_told_where_none_is_a_version(written: Path) -> None:
    assert strangers_among(written.parent, NAME) == ()
    other = re.compile(r"step_(?P<version>\d+)")
    assert strangers_among(written.parent, other) == ("000013", "checkpoint-12", "logs", "notes-7")
    (written.parent / "empty").mkdir()
    assert strangers_among(written.parent / "empty", other) == ()


@pytest.mark.parametrize("state", ["no index", "no shard", "torn", "header", "empty", "young"])
def test_what_is_half_written_waits_and_says_for_what(written: Path, state: str) -> None:
    shard = sorted(written.glob("*.safetensors"))[1]
    newest = max(path.stat().st_mtime for path in written.iterdir())
    now = LATER
    match state:
        case "no index":  # single files have none; here the shards alone would do
            (written / INDEX_FILE).unlink()
        case "no shard":
            shard.unlink()
        case "torn":
            os.truncate(shard, shard.stat().st_size - 1)
        case "header":
            os.truncate(shard, 4)
        case "empty":
            for path in written.iterdir():
                path.unlink()
        case "young":
            now = newest + 4.9
    (twelve, _) = look(written.parent, now=now)
    expected = {"no shard": shard.name, "torn": shard.name, "header": shard.name}
    expected |= {"no index": "", "empty": ".safetensors", "young": "5 s without a write"}
    assert expected[state] in twelve.waits_for
    assert bool(twelve.waits_for) == (state != "no index")


def test_a_marker_is_all_that_counts_where_there_is_one(written: Path) -> None:
    assert {one.waits_for for one in look(written.parent, marker="STABLE", now=0)} == {"STABLE"}
    (written / "STABLE").touch()
    assert [one.waits_for for one in look(written.parent, marker="STABLE", now=0)] == ["", "STABLE"]


def test_two_directories_of_one_version_wait_for_a_person(written: Path) -> None:
    shutil.copytree(written, written.parent / "000012")
    (twelve, _) = look(written.parent)
    assert twelve.waits_for == ("one directory of version 12: there are 000012 and checkpoint-12")


@pytest.mark.parametrize("stray", ["000012", "checkpoint-12.log.12", "link-12"])
def test_a_plain_file_is_no_second_directory_of_a_version(written: Path, stray: str) -> None:
    if "link" in stray:
        (written.parent / stray).symlink_to(written.parent / "gone")
    else:
        (written.parent / stray).write_text("a file")
    assert [one.waits_for for one in look(written.parent)] == ["", ""]


@pytest.mark.parametrize("name", ["x\0y.safetensors", "\ud800.safetensors", "../x", "a/b", 7, None])
def test_an_index_with_impossible_names_holds_up_its_own_version_alone(
    written: Path, name: object
) -> None:
    (written / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": name}}))
    twelve, thirteen = look(written.parent)
    assert "file_name" in twelve.waits_for
    assert twelve.waits_for.encode()
    assert not thirteen.waits_for


def test_a_directory_that_the_system_refuses_waits(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def stale(path: Path, **options: bool) -> os.stat_result:
        if path == written:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    assert [one.waits_for for one in look(written.parent)] == [
        "a directory that can be read: Stale file handle",
        "",
    ]


def test_a_parent_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="nowhere"):
        look(tmp_path / "nowhere")


def test_what_has_ended_is_not_even_looked_at(written: Path) -> None:
    def after(version: int) -> list[int]:
        found = find_arrivals(
            written.parent, NAME, after=version, marker=None, still_seconds=0, now=LATER
        )
        return [one.version for one in found]

    assert [after(version) for version in (11, 12, 13)] == [[12, 13], [13], []]
    shutil.rmtree(written)
    assert after(11) == [13]


def test_the_newest_may_be_enough() -> None:
    found = [Arrival(version, Path(str(version))) for version in (1, 2, 4, 5)]
    found.insert(2, Arrival(3, Path("3"), "a shard"))
    assert [one.version for one in to_publish(found, newest_only=False)] == [1, 2, 4, 5, 3]
    assert [one.version for one in to_publish(found, newest_only=True)] == [5, 3]


def test_shards_that_are_numbered_wait_for_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        (one,) = look(tmp_path) or [None]
        assert one is None or one.waits_for
        shutil.copy(GOLDEN / "v0.safetensors", directory / name)
    assert not look(tmp_path)[0].waits_for


@pytest.mark.parametrize("name", ["v(?P<version>\\d+)?", "v(?P<version>\\w+)"])
def test_a_pattern_that_takes_more_than_versions_finds_only_those(
    tmp_path: Path, name: str
) -> None:
    for directory in ("v", "vx", "v12345678901", "v7"):
        (tmp_path / directory).mkdir()
    found = find_arrivals(
        tmp_path, re.compile(name), after=None, marker=None, still_seconds=0, now=LATER
    )
    assert [one.version for one in found] == [7]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "checkpoint-("),
        ("name", r"checkpoint-(\d+)"),
        ("marker", "a/b"),
        ("still_seconds", -1),
        ("parent", "relative"),
        ("deployment", "served"),
        ("every", 1),
    ],
)
def test_wrong_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        WatchSpec.model_validate({"cycle": CYCLE, field: value})


def test_the_cycle_of_a_version_is_the_declared_one_elsewhere() -> None:
    spec = WatchSpec.model_validate({"cycle": CYCLE})
    assert spec.directory == "/checkpoints/run"
    cycle = spec.cycle_of("/checkpoints/run/000007", 7)
    assert (cycle.name, cycle.checkpoint) == ("run-000007", "/checkpoints/run/000007")
    assert cycle.model_copy(update={"checkpoint": CYCLE["checkpoint"], "policy_version": 1}) == (
        spec.cycle
    )


def test_what_ranks_commit_appears_in_no_directory() -> None:
    cycle = CYCLE | {"checkpoint": "ranks"}
    with pytest.raises(ValueError, match="parent: expected a directory"):
        WatchSpec.model_validate({"cycle": cycle})
    assert WatchSpec.model_validate({"cycle": cycle, "parent": "/saved"}).directory == "/saved"
