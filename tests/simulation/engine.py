"""Stand-ins for what Prefect does around flows and tasks: retries, cached results, nothing shown.

A task runs as its own function, under its own retry condition and delays. What Prefect itself does
wrong stays unseen here; tests/flows run the real engine.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefect
from pydantic import BaseModel

from tests.simulation.loop import PROCESS

LOGGER = logging.getLogger("simulation")
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False


@dataclass(frozen=True)
class Ended:
    """The state of a task run, as far as this program looks at it."""

    name: str
    value: Any = None
    error: BaseException | None = None

    async def aresult(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class Step:
    """A task without an engine."""

    def __init__(self, task: Any, storage: Path | None = None, *, refresh: bool = False) -> None:
        self.task, self.fn = task, task.fn
        self._storage, self._refresh = storage, refresh

    def with_options(
        self, *, result_storage: Path | None = None, refresh_cache: bool = False
    ) -> Step:
        return Step(self.task, result_storage or self._storage, refresh=refresh_cache)

    async def __call__(self, *arguments: Any, return_state: bool = False, **named: Any) -> Any:
        ended = await self._run(arguments, named)
        return ended if return_state else ended.value

    async def _run(self, arguments: Any, named: Any) -> Ended:
        kept = self._kept(arguments, named)
        if kept is not None and not self._refresh and kept.exists():
            kind: type[BaseModel] = typing.get_type_hints(self.fn)["return"]
            return Ended("Cached", kind.model_validate_json(kept.read_bytes()))
        value = await self._attempts(arguments, named)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(value.model_dump_json())
        return Ended("Completed", value)

    async def _attempts(self, arguments: Any, named: Any) -> Any:
        task = self.task
        attempt = 0
        while True:
            try:
                return await self.fn(*arguments, **named)
            except Exception as error:
                if attempt >= task.retries:
                    raise
                failed: Any = Ended("Failed", error=error)
                if not await task.retry_condition_fn(task, None, failed):
                    raise
            delays = task.retry_delay_seconds
            delay = delays[min(attempt, len(delays) - 1)]
            attempt += 1
            world = PROCESS.get().world  # type: ignore[union-attr]
            await asyncio.sleep(delay * (1 + world.random.uniform(0, task.retry_jitter_factor)))

    def _kept(self, arguments: Any, named: Any) -> Path | None:
        if self._storage is None or self.task.cache_key_fn is None:
            return None
        bound = inspect.signature(self.fn).bind(*arguments, **named)
        bound.apply_defaults()
        return self._storage / str(self.task.cache_key_fn(None, bound.arguments))


async def _shows_nothing(*_: Any, **__: Any) -> None:
    return None


class Replaced:
    """Attributes of modules that stand-ins take the place of, for as long as a block lasts."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


@contextmanager
def replacing() -> Iterator[Replaced]:
    """Undo at the end what was replaced."""
    replaced = Replaced()
    try:
        yield replaced
    finally:
        replaced.undo()


def put_steps(replaced: Replaced) -> None:
    """Put a step where a module of the pipeline names a task, and a flow's own function where it
    names a flow."""
    import flows.cycle
    import flows.retain
    import tasks.show

    steps: dict[int, Step] = {}
    for module in [sys.modules[name] for name in sorted(sys.modules)]:
        if module.__name__.partition(".")[0] not in ("flows", "tasks"):
            continue
        for name, value in sorted(vars(module).items()):
            if isinstance(value, prefect.Task):
                replaced.put(module, name, steps.setdefault(id(value), Step(value)))
            elif isinstance(value, prefect.Flow):
                replaced.put(module, name, value.fn)
            elif name == "get_run_logger":
                replaced.put(module, name, lambda: LOGGER)
    replaced.put(flows.cycle, "show_cycle", _shows_nothing)
    replaced.put(flows.retain, "show_retention", _shows_nothing)
    replaced.put(tasks.show, "emit_event", lambda *_, **__: None)
    replaced.put(tasks.show, "acreate_progress_artifact", _shows_nothing)
    replaced.put(tasks.show, "aupdate_progress_artifact", _shows_nothing)
