"""Rows of a dataset → problems: what a row may be, and what of it is refused.

A row that cannot be used stops everything, with its number: a problem that is left out in silence
would change what a policy learns.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from math import isinf, isnan
from typing import Any, NoReturn

from hotload.errors import InvalidProblemsError
from hotload.rollout.trajectory import TOKEN_ID_LIMIT, Problem

ROW_LIMIT_BYTES = 8 << 20
ROW_COUNT_LIMIT = 1 << 21
ID_LIMIT_CHARACTERS = 256
DEPTH_LIMIT = 64
SHOWN_FIELDS = 12

Row = tuple[str, int, bytes | Mapping[str, Any]]
"""The file a row is from, its number from 1, and what it is: JSON, or the values of a table."""


def parse_problems(
    rows: Iterable[Row],
    *,
    source: str,
    prompt_field: str | None = None,
    answer_field: str = "answer",
    max_rows: int | None = None,
) -> tuple[Problem, ...]:
    """Parse rows, no more of them than `max_rows`; `null` is the same as no such field.

    A row has a prompt (text, token ids, or the messages of a chat, in `prompt` or `messages`, or in
    the field that is named) and usually an answer; everything else is kept in `extra`. A row
    without `id` (text or integer) gets one from its prompt and answer.

    Args:
        source: the dataset's name, for the error.
        prompt_field: the field with the prompt; empty is `prompt` or `messages`.
        answer_field: the field with the answer; `a.b` is `b` within `a`, where there is no `a.b`.

    Raises:
        InvalidProblemsError: no row, too many, a malformed one, or an id used twice.
    """
    problems: dict[str, Problem] = {}
    made: Counter[str] = Counter()
    for file, number, row in rows:
        if len(problems) == ROW_COUNT_LIMIT:
            raise InvalidProblemsError(
                source, 0, f"more than {ROW_COUNT_LIMIT} rows: say `problems.max_rows`"
            )
        try:
            values = _decoded(row) if isinstance(row, bytes) else _plain(row, "")
            problem = _problem(values, prompt_field, answer_field, made)
            if problem.id in problems:
                raise ValueError(f"id {problem.id!r} is used twice")
        except (ValueError, RecursionError) as error:
            raise InvalidProblemsError(file, number, str(error)) from None
        problems[problem.id] = problem
        if len(problems) == max_rows:
            break
    if not problems:
        raise InvalidProblemsError(source, 0, "the file has no rows")
    return tuple(problems.values())


def render_problem(problem: Problem, prompt_field: str | None, answer_field: str) -> bytes:
    """Write a problem as the line that `parse_problems` reads it from with these fields."""
    asked = "prompt" if problem.messages is None else "messages"
    row = {
        **problem.extra,
        "id": problem.id,
        prompt_field or asked: problem.messages or problem.prompt,
        answer_field: problem.answer,
    }
    return json.dumps(row).encode() + b"\n"


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is beyond any float")
    return value


_DECODER = json.JSONDecoder(parse_constant=_not_json, parse_float=_finite)


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:200]}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if line.count(b"[") + line.count(b"{") > DEPTH_LIMIT and _depth(row) > DEPTH_LIMIT:
        raise ValueError(f"nested more than {DEPTH_LIMIT} deep")
    if rb"\ud" in line.lower() and not _is_unicode(row):
        raise ValueError("half of a surrogate pair, which is not text")
    return row


def _plain(value: Any, column: str) -> Any:
    """Write what a table holds as JSON has it: moments and decimals as text, NaN as `null`."""
    if isinstance(value, Mapping):
        return {name: _plain(part, column or name) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, column) for part in value]
    if isinstance(value, float) and isnan(value):  # what pandas writes where nothing is
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    if value is None or (isinstance(value, str | int | float) and value not in (INF, -INF)):
        return value
    found = f"{type(value).__name__} {value!r:.40}"
    raise ValueError(f"column `{column}`: expected what JSON has, found {found}; drop the column")


INF = float("inf")


def _problem(
    row: dict[str, Any], prompt_field: str | None, answer_field: str, made: Counter[str]
) -> Problem:
    present = {name for name, value in row.items() if value is not None}
    names = present & ({prompt_field} if prompt_field else {"prompt", "messages"})
    if len(names) != 1:
        wanted = f"`{prompt_field}`" if prompt_field else "exactly one of `prompt` and `messages`"
        shown = ", ".join(sorted(present)[:SHOWN_FIELDS]) or "no field with a value"
        hint = "" if prompt_field else "; `problems.prompt_field` names another"
        raise ValueError(f"expected {wanted}, found {shown}{hint}")
    asked = names.pop()
    prompt, messages = _prompt(row.pop(asked), asked)
    for name in () if prompt_field else ("prompt", "messages"):
        row.pop(name, None)  # null
    answer = _taken(row, answer_field)
    name = row.pop("id", None)
    if name is None:
        facts = json.dumps([prompt, messages, answer], sort_keys=True)
        name = hashlib.sha256(facts.encode()).hexdigest()[:16]
        made[name] += 1
        name = f"{name}-{made[name]}" if made[name] > 1 else name
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not 0 < len(name) <= ID_LIMIT_CHARACTERS:
        raise ValueError(f"`id`: expected 1-{ID_LIMIT_CHARACTERS} characters or an integer")
    if row.get("tools") is not None:
        row["tools"] = _tools(row["tools"])
    return Problem(name, prompt, messages, answer, row)


def _prompt(
    given: Any, field: str
) -> tuple[str | tuple[int, ...] | None, tuple[Mapping[str, Any], ...] | None]:
    """Read a prompt: text or token ids, or else the messages of a chat."""
    if isinstance(given, str) and given and field != "messages":
        return given, None
    parts = given if isinstance(given, list) else []
    if parts and field != "messages" and all(map(_is_token_id, parts)):
        return tuple(parts), None
    if parts and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in parts
    ):
        return None, tuple(_without_nulls(one) for one in parts)
    if field == "messages":
        raise ValueError("`messages`: expected a list of objects, each with a `role`")
    raise ValueError(
        f"`{field}`: expected text, a list of token ids, or messages that each have a `role`, and"
        " not an empty one"
    )


def _taken(row: dict[str, Any], field: str) -> Any:
    """Take a field out of the row; of a path the value is read and the row left as it is."""
    if field in row or "." not in field:
        return row.pop(field, None)
    value: Any = row
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Read the tools that a chat is offered; a table may have them as the text of JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools`: expected a list of objects")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Leave out what a table has as `null` only because another row has a value there; a message
    may have no `content`.
    """
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_nulls(part)
        for name, part in value.items()
        if part is not None or (name == "content" and "role" in value)
    }


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _depth(value: Any) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, below), default=0)


def _is_token_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < TOKEN_ID_LIMIT
