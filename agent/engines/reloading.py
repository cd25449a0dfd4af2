"""What an agent asks of the inference server it stands beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.loading.disk import Transition


@dataclass(frozen=True, slots=True)
class Reload:
    """Weights to be served: their directory and name, and what becomes of requests and prefixes.

    ASYNC lets running requests go on with the new weights, SYNC lets them end with the old.
    `reset_prompt_cache` is `all`, `new_session` or `none` (protocol §4).
    """

    directory: Path
    identity: str
    transition: Transition = "ASYNC"
    reset_prompt_cache: str = "all"

    @property
    def flushes(self) -> bool:
        """Whether prefixes of the old weights go. No server here keeps them by session: with
        `new_session` all go."""
        return self.reset_prompt_cache != "none"


class EngineError(RuntimeError):
    """The inference server refuses, or did not do what it was told."""


class EngineAwayError(EngineError):
    """The inference server does not answer: it is not up, or not yet."""


class EngineDiedError(EngineAwayError):
    """The inference server failed in a reload, and does not answer since."""


@contextmanager
def reload_under_way() -> Iterator[None]:
    """Take an engine that is gone amid a reload for one that failed in it, and was not away."""
    try:
        yield
    except EngineAwayError as error:
        raise EngineError(str(error)) from None


class ReloadingEngine(Protocol):
    """An inference server, and how it is told to load."""

    @property
    def tells_version(self) -> bool:
        """Whether it can be asked what it serves."""

    @property
    def has_address(self) -> bool:
        """Whether it is asked at the address it was given, and not by commands alone."""

    async def version(self) -> str | None:
        """Ask for the name of what it serves; None where it was never given one, or cannot tell.

        Raises:
            EngineError: it does not answer, or not in the form of its kind.
        """

    async def reload(self, reload: Reload) -> None:
        """Let it serve other weights; returns when it does. After an error it may serve none, or
        some of each: it has to be told again.

        Raises:
            EngineAwayError: it was not there, and nothing was begun.
            EngineError: it did not.
        """
