"""Counts what the clients are asked for from outside, and the HTTP requests they make of it."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from contextvars import ContextVar
from typing import Any

CALLS: Counter[str] = Counter()
REQUESTS: Counter[str] = Counter()
_inside: ContextVar[bool] = ContextVar("_inside", default=False)


def surface(kind: type) -> set[str]:
    """The methods and properties that a caller of `kind` has."""
    members = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    return {
        name
        for name, member in members.items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


def uncalled(kind: type, before: Counter[str] | None = None) -> set[str]:
    """What of a counted class no test has called, since `before` or at all in this session."""
    called = CALLS - (before or Counter())
    return {name for name in surface(kind) if not called[f"{kind.__name__}.{name}"]}


def count_calls(kind: Any, *names: str) -> None:
    """Count the calls of `names`, which no other counted call has made."""
    for name in names:
        setattr(kind, name, _counted(inspect.getattr_static(kind, name), name))


def count_requests(kind: Any) -> None:
    """Count what an HTTP client sends."""
    send, label = kind.send, f"{kind.__module__}.{kind.__name__}"

    @functools.wraps(send)
    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        REQUESTS[label] += 1
        return send(self, *arguments, **named)

    kind.send = counted


def summary() -> list[str]:
    """Lines for a reader."""
    lines = [
        f"{CALLS.total()} calls of {len(CALLS)} methods, {REQUESTS.total()} HTTP requests",
    ]
    for kind in sorted({call.partition(".")[0] for call in CALLS}):
        counts = [count for call, count in CALLS.items() if call.startswith(f"{kind}.")]
        lines.append(f"  {kind}: {sum(counts)} calls of {len(counts)} methods")
    return lines + [f"  {kind}: {count} requests" for kind, count in sorted(REQUESTS.items())]


def _counted(member: Any, name: str) -> Any:
    if isinstance(member, property):
        return property(_counted(member.fget, name), member.fset, member.fdel)

    def note(self: object) -> None:
        if not _inside.get():
            CALLS[f"{type(self).__name__}.{name}"] += 1

    if inspect.iscoroutinefunction(member):

        @functools.wraps(member)
        async def answer_later(self: object, *arguments: Any, **named: Any) -> Any:
            note(self)
            token = _inside.set(True)
            try:
                return await member(self, *arguments, **named)
            finally:
                _inside.reset(token)

        return answer_later

    @functools.wraps(member)
    def answer(self: object, *arguments: Any, **named: Any) -> Any:
        note(self)
        token = _inside.set(True)
        try:
            return member(self, *arguments, **named)
        finally:
            _inside.reset(token)

    return answer
