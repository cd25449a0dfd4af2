"""Problem files as people have them: rows of every kind, in every form, from anywhere."""

import gzip
import io
import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
import zstandard

from hotload.errors import InvalidProblemsError
from hotload.rollout import problem_rows
from hotload.rollout.trajectory import Problem
from hotload.sampling import problem_files
from hotload.sampling.problems import read_problems

GOOD = b'{"id": "a", "prompt": "x", "answer": 3, "level": 2}\n'
A = Problem("a", "x", None, 3, {"level": 2})
CHAT = ({"role": "user", "content": "hi"},)


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., tuple[Problem, ...]]:
    def parsed(data: bytes, **fields: Any) -> tuple[Problem, ...]:
        (tmp_path / "rows").write_bytes(data)
        return read_problems(str(tmp_path / "rows"), **fields)

    return parsed


Parse = Callable[..., tuple[Problem, ...]]


def test_rows_of_every_kind(parse: Parse) -> None:
    data = GOOD + b"\r\n   \n" + b'{"id": 7, "prompt": [1, 2]}\n'
    data += b'{"id": "b", "prompt": "\\ud83d\\ude00", "y": [' + b"[]," * 70 + b"[]]}\n"
    data += b'{"id": "c", "messages": [{"role": "user", "content": "hi"}]}\n'
    data += b'{"id": "d", "messages": null, "prompt": [{"role": "user", "content": "hi"}]}'
    assert parse(data) == (
        A,
        Problem("7", (1, 2)),
        Problem("b", "\N{GRINNING FACE}", extra={"y": [[]] * 71}),
        Problem("c", None, CHAT),
        Problem("d", None, CHAT),
    )


def test_fields_of_other_names(parse: Parse) -> None:
    row = b'{"id": 1, "question": "1+1", "prompt": "p", "s": {"truth": "2"}, "answer": "two"}'
    assert parse(row, prompt_field="question", answer_field="s.truth") == (
        Problem("1", "1+1", None, "2", {"prompt": "p", "s": {"truth": "2"}, "answer": "two"}),
    )
    assert parse(
        b'{"id": 1, "q": [{"role": "user"}], "a.b": 3}', prompt_field="q", answer_field="a.b"
    )[0] == Problem("1", None, ({"role": "user"},), 3)
    assert parse(GOOD, answer_field="solution")[0].answer is None


def test_a_row_without_an_id_gets_one_that_stays(parse: Parse) -> None:
    rows = [b'{"prompt": "x", "answer": 1}', b'{"id": null, "prompt": "y"}']
    one, other = (problem.id for problem in parse(b"\n".join(rows)))
    assert [problem.id for problem in parse(b"\n".join(reversed(rows)))] == [other, one]
    assert parse(rows[0] + b"\n" + rows[0] + b"\n" + rows[0])[2].id == f"{one}-3"
    assert one != other
    assert one == "4275937c1f072e76"


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"id": 7, "prompt": "é", "answer": 3, "level": None}, (None, "answer")),
        ({"prompt": [1, 2], "answer": {"a": [1.5]}}, (None, "answer")),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"a": 1}]}, (None, "answer")),
        ({"question": "q", "prompt": "kept", "messages": "kept"}, ("question", "answer")),
        ({"id": "a", "prompt": "x", "meta": {"truth": "4", "b": 1}}, (None, "meta.truth")),
    ],
    ids=str,
)
def test_a_problem_that_is_written_is_read_as_it_was(
    parse: Parse, row: dict[str, Any], fields: tuple[str | None, str]
) -> None:
    prompt_field, answer_field = fields
    declared = {"prompt_field": prompt_field, "answer_field": answer_field}
    problems = parse(json.dumps(row).encode(), **declared)
    written = b"".join(problem_rows.render_problem(one, *fields) for one in problems)
    assert parse(written, **declared) == problems


def test_null_is_left_out_of_messages_and_tools_alone(parse: Parse) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "name": None,
        "tool_calls": [{"id": "1", "x": None}],
    }
    row = {
        "id": "a",
        "messages": [*CHAT, call],
        "tools": [{"type": "function", "x": None}],
        "y": None,
    }
    (problem,) = parse(json.dumps(row).encode())
    assert problem.messages == (
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    )
    assert problem.extra == {"tools": [{"type": "function"}], "y": None}
    row["tools"] = json.dumps([{"type": "function"}])
    assert parse(json.dumps(row).encode())[0].extra["tools"] == [{"type": "function"}]


@pytest.mark.parametrize(
    ("data", "row", "reason"),
    [
        (b"", 0, "no rows"),
        (b"\n \n", 0, "no rows"),
        (GOOD + b"{", 2, "over several lines"),
        (GOOD + b'{"a"', 2, "not JSON"),
        (GOOD + b"\xff\xfe", 2, "not JSON"),
        (b'{"id": "a", "prompt": NaN}', 1, "NaN"),
        (b'{"id": "a", "prompt": "x", "answer": 1e999}', 1, "1e999 is beyond any float"),
        (GOOD + b"[" * 100_000, 2, "not JSON"),
        (GOOD + b"[1]", 2, "expected an object"),
        (b'{"id": true, "prompt": "x"}', 1, "`id`"),
        (b'{"id": "", "prompt": "x"}', 1, "`id`"),
        (b'{"id": "%s", "prompt": "x"}' % (b"x" * 257), 1, "`id`"),
        (b'{"id": "a", "question": "x"}', 1, "exactly one .* found id, question; `problems"),
        (b"{}", 1, "found no field with a value"),
        (b'{"id": "a", "prompt": "x", "messages": []}', 1, "exactly one"),
        (b'{"id": "a", "prompt": ""}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": null}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": []}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [1, true]}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [-1]}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [4294967296]}', 1, "`prompt`"),
        (b'{"id": "a", "prompt": [{"from": "user"}]}', 1, "`prompt`.* messages that each"),
        (b'{"id": "a", "messages": []}', 1, "`messages`"),
        (b'{"id": "a", "messages": "x"}', 1, "`messages`"),
        (b'{"id": "a", "messages": null}', 1, "`prompt`"),
        (b'{"id": "a", "messages": [{"content": "x"}]}', 1, "`messages`"),
        (b'{"id": "a", "prompt": "x", "tools": "no"}', 1, "`tools`"),
        (b'{"id": "a", "prompt": "\\ud800"}', 1, "surrogate"),
        (b'{"id": "a", "prompt": "x", "y": ' + b"[" * 70 + b"]" * 70 + b"}", 1, "deep"),
        (GOOD + b"\n" + GOOD, 3, "used twice"),
        (GOOD + b'{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "x"}', 3, "used twice"),
        (b"[", 0, "not closed"),
        (b"[" + GOOD + b'"x"]', 2, "expected an object, found str"),
        (b"[" + GOOD + b"] x", 0, "follows the end"),
        (b"[" + GOOD + b"{]", 2, "not JSON"),
        (b"[" * 100_000, 1, "not JSON"),
        (b"id,prompt\n1,x\n", 1, "neither JSON lines nor .* begins b'id,prompt'"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(parse: Parse, data: bytes, row: int, reason: str) -> None:
    with pytest.raises(InvalidProblemsError, match=reason) as caught:
        parse(data)
    assert caught.value.row == row or (row == 0 and "not JSON" in str(caught.value))


def test_a_named_field_that_is_not_there(parse: Parse) -> None:
    with pytest.raises(InvalidProblemsError, match="row 1: expected `question`, found answer, id"):
        parse(GOOD, prompt_field="question")


TABLE = pl.DataFrame(
    {
        "id": [None, "b", None],
        "messages": [None, [{"role": "user", "content": "hi", "name": None}], None],
        "prompt": ["x", None, "z"],
        "answer": [1.0, float("nan"), 2.5],
        "on": [date(2026, 1, 2), None, None],
    }
)


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    write(file := io.BytesIO())
    return file.getvalue()


TABLES = {
    "parquet": written(TABLE.write_parquet),
    "arrow": written(TABLE.write_ipc),
    "arrow stream": written(TABLE.write_ipc_stream),
    "parquet.gz": gzip.compress(written(TABLE.write_parquet)),
}


@pytest.mark.parametrize("form", TABLES)
def test_tables(parse: Parse, form: str) -> None:
    first, chat, last = parse(TABLES[form])
    assert (first.prompt, first.answer, first.extra) == ("x", 1.0, {"on": "2026-01-02"})
    assert (chat.id, chat.messages, chat.answer) == ("b", CHAT, None)
    assert (last.prompt, len(last.id)) == ("z", 16)
    assert parse(TABLES[form], max_rows=1) == (first,)
    with pytest.raises(InvalidProblemsError, match=r"Parquet|Arrow|damaged"):
        parse(TABLES[form][:-40])


def test_what_a_table_has_and_json_has_not(parse: Parse) -> None:
    table = pl.DataFrame({"prompt": ["x"], "image": [b"\x89PNG"]})
    with pytest.raises(InvalidProblemsError, match=r"row 1: column `image`: .* drop the column"):
        parse(written(table.write_parquet))


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.decode().encode("utf-16"),
        GOOD.decode().encode("utf-16-le"),
        gzip.compress(GOOD),
        gzip.compress(GOOD[:9]) + gzip.compress(GOOD[9:]),
        zstandard.compress(GOOD),
        b"[" + GOOD + b"]",
        b"\xef\xbb\xbf [\n" + json.dumps(json.loads(GOOD), indent=2).encode() + b"\n]\n",
        gzip.compress(b"[" + GOOD + b"]"),
        ("[" + GOOD.decode() + "]").encode("utf-16"),
    ],
)
def test_one_row_however_it_is_written(parse: Parse, data: bytes) -> None:
    assert parse(data) == (A,)


def test_an_array_of_many_rows(parse: Parse) -> None:
    rows = [{"id": str(i), "prompt": "é" * (i % 700) + "x"} for i in range(3000)]
    assert [problem.id for problem in parse(json.dumps(rows).encode())] == [
        str(i) for i in range(3000)
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04" + bytes(9), "a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS pointer.*git lfs pull"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (b"BZh91AY", "compressed with bzip2"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x80\x04\x95", "a Python pickle"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page"),
        (bytes(600), "zeros"),
        (bytes(range(1, 200)) + bytes(58) + b"ustar\0", "a tar archive"),
        (gzip.compress(gzip.compress(GOOD)), "compressed twice"),
        (gzip.compress(GOOD * 99)[:-20], "compressed, and damaged"),
        (zstandard.compress(GOOD)[:-3], "damaged: it ends in the middle of a frame"),
        (zstandard.compress(GOOD)[:9] + b"xyz", "compressed, and damaged"),
        (b"PAR1" + bytes(8) + b"PAR1", "it is Parquet, and cannot be read"),
        (gzip.compress(b"PK\x03\x04"), "a zip archive"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(parse: Parse, data: bytes, reason: str) -> None:
    with pytest.raises(InvalidProblemsError, match=reason):
        parse(data)


def test_local_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidProblemsError, match="does not exist"):
        read_problems(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InvalidProblemsError, match="a directory without"):
        read_problems(str(tmp_path))
    with pytest.raises(InvalidProblemsError, match="no file has such a name"):
        read_problems(str(tmp_path / "*.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidProblemsError, match="not a regular file"):
        read_problems(str(tmp_path / "pipe"))


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_directory_of_shards(tmp_path: Path, scheme: str) -> None:
    root = f"{scheme}{tmp_path}"
    files = {
        "dataset_info.json": b"{}",
        "state.json": b"{}",
        "cache-1.arrow": b"not looked at",
        "data-00000-of-00002.arrow": TABLES["arrow stream"],
        "data-00001-of-00002.arrow": written(
            pl.DataFrame({"id": ["c"], "prompt": ["q"]}).write_ipc_stream
        ),
    }
    for name, data in files.items():
        with fsspec.open(f"{root}/saved/{name}", "wb", auto_mkdir=True) as file:
            file.write(data)
    assert [problem.prompt for problem in read_problems(f"{root}/saved")] == ["x", None, "z", "q"]
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"):
        with fsspec.open(f"{root}/hub/{name}", "wb", auto_mkdir=True) as file:
            file.write(TABLES["parquet"])
    with pytest.raises(InvalidProblemsError, match=r"splits.*hub/data/test\*\.parquet, .*train"):
        read_problems(f"{root}/hub")
    assert len(read_problems(f"{root}/hub/data/train*.parquet")) == 3


def test_an_unknown_file_system_is_named() -> None:
    with pytest.raises(InvalidProblemsError, match="nosuch"):
        read_problems("nosuch://bucket/rows.jsonl")


def test_sizes_are_bounded_while_reading(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_files, "ROW_LIMIT_BYTES", 200_000)
    long = b'{"id": "a", "prompt": "' + b"x" * 300_000 + b'"}'
    for data in (
        long,
        b"[" + long + b"]",
        written(pl.DataFrame({"prompt": ["x" * 300_000]}).write_parquet),
    ):
        with pytest.raises(InvalidProblemsError, match="row 1: larger than 200000 bytes"):
            parse(data)
    monkeypatch.setattr(problem_files, "DATASET_LIMIT_BYTES", 1 << 20)
    lines = (b'{"prompt": "x"}' + b" " * 150_000 + b"\n") * 20
    table = pl.DataFrame({"prompt": ["x" * 150_000] * 20})
    forms = (
        lines,
        gzip.compress(lines),
        zstandard.compress(lines),
        b"[" + lines.replace(b"\n", b",") + b"{}]",
        written(table.write_parquet),
        written(table.write_ipc_stream),
    )
    for data in forms:
        with pytest.raises(InvalidProblemsError, match="larger than 1048576 bytes: say `problems"):
            parse(data)
    for data in forms[:5]:
        assert len(parse(data, max_rows=2)) == 2
    monkeypatch.setattr(problem_rows, "ROW_COUNT_LIMIT", 2)
    with pytest.raises(InvalidProblemsError, match=r"more than 2 rows: say `problems\.max_rows`"):
        parse(b'{"prompt": "x"}\n' * 3)
    assert len(parse(b'{"prompt": "x"}\n' * 3, max_rows=2)) == 2
