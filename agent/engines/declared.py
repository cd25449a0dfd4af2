"""Any server: a command or an HTTP call that its owner declares, and one that tells the version.

`systemctl restart engine` is a command, run without a shell. `POST /reload {"path":
"{directory}"}` is a call to the engine's address. In both `{directory}`, `{identity}`,
`{transition}` and `{reset_prompt_cache}` are filled in. What tells the version is a command that
prints it, or `GET /info weight_version`: the field of the answer that has it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
from asyncio.subprocess import PIPE, STDOUT
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agent.engines.calls import (
    ANSWER_LIMIT_BYTES,
    CONTROL_SECONDS,
    HEAD_CHARS,
    RELOAD_SECONDS,
    call,
)
from agent.engines.reloading import EngineError, Reload
from hotload.clients.redaction import redact
from hotload.errors import did_you_mean
from hotload.publish.fireworks_api import hint_body
from hotload.sampling.reward.user_errors import secret_values

METHODS = ("GET", "POST", "PUT")
PLACEHOLDERS = ("directory", "identity", "transition", "reset_prompt_cache")
END_SECONDS = 1.0  # for a command that was killed to be gone
PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class DeclaredServer:
    """A server that is reloaded by `reload_by`, and asked by `version_by` where that is given."""

    url: str
    reload_by: str
    version_by: str | None = None

    def __post_init__(self) -> None:
        """Read both once, so that a wrong one is told at the start."""
        for declared in filter(None, (self.reload_by, self.version_by)):
            _parse(declared)

    @property
    def tells_version(self) -> bool:
        """Whether its owner has said how it is asked."""
        return self.version_by is not None

    @property
    def has_address(self) -> bool:
        """Whether one of both is a call."""
        return any(_parse(one)[0] for one in (self.reload_by, self.version_by) if one)

    async def version(self) -> str | None:
        """Ask as declared; None where nothing is."""
        if self.version_by is None:
            return None
        found = await self._carry_out(self.version_by, {}, CONTROL_SECONDS)
        field = _parse(self.version_by)[2]
        if isinstance(field, str) and field:
            found = found.get(field) if isinstance(found, dict) else None
        return str(found).strip() or None if found is not None else None

    async def reload(self, reload: Reload) -> None:
        """Carry out what is declared; it returns when the server answers with the new weights."""
        values = {name: getattr(reload, name) for name in PLACEHOLDERS}
        await self._carry_out(self.reload_by, values, RELOAD_SECONDS)

    async def _carry_out(self, declared: str, values: dict[str, Any], seconds: float) -> Any:
        method, rest, last = _parse(declared)
        if method:
            body = None if isinstance(last, str) else hint_body(last, values)
            path = str(hint_body(rest, values))
            return await call(self.url, method, path, body, timeout_seconds=seconds)
        return await _run([str(hint_body(word, values)) for word in shlex.split(rest)], seconds)


def _parse(declared: str) -> tuple[str, str, Any]:
    """Method, path, and the body or the field's name; of a command no method, and all of it."""
    for name in re.findall(r"\{(\w+)\}", declared):
        if name not in PLACEHOLDERS and (meant := did_you_mean(name, PLACEHOLDERS)):
            raise ValueError(f"{declared}: found {{{name}}}{meant}")
    method, _, rest = declared.strip().partition(" ")
    if method not in METHODS:
        if method.isupper() and rest.lstrip().startswith("/"):
            raise ValueError(f"{declared}: found {method}, expected {', '.join(METHODS)}")
        if not shlex.split(declared):
            raise ValueError("expected a command, or a method and a path")
        return "", declared, ""
    path, _, last = rest.strip().partition(" ")
    if not path.startswith("/"):
        raise ValueError(f"expected a path after {method}, found {path!r}")
    if not (last := last.strip()).startswith("{"):
        return method, path, last
    try:
        return method, path, json.loads(last)
    except ValueError as error:
        raise ValueError(f"{declared}: expected JSON behind the path: {error}") from None


async def _run(words: list[str], seconds: float) -> str:
    """Run a command to its end, which has to come in time; the last of what it printed, at most
    1 MiB."""
    process, printed = None, b""
    try:
        async with asyncio.timeout(seconds):
            process = await asyncio.create_subprocess_exec(*words, stdout=PIPE, stderr=STDOUT)
            assert process.stdout is not None
            while piece := await process.stdout.read(PIECE_BYTES):
                printed = (printed + piece)[-ANSWER_LIMIT_BYTES:]
            await process.wait()
    except (OSError, TimeoutError) as error:
        raise EngineError(f"{words[0]}: {type(error).__name__}: {error}") from None
    finally:
        if process is not None and process.returncode is None:
            process.kill()
            with suppress(TimeoutError):  # what it has begun may hold its output open
                async with asyncio.timeout(END_SECONDS):
                    await process.wait()
    text = printed.decode("utf-8", "replace")
    if process.returncode:  # reports are read without a key
        tail = redact(text, secret_values(os.environ))[-HEAD_CHARS:]
        said = " ".join(tail.split())
        raise EngineError(f"{words[0]}: exit status {process.returncode}: {said}")
    return text
