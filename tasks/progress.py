"""Progress: a bar in the Prefect UI for steps that take a person's patience."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

SECONDS_BEFORE_THE_FIRST = 5.0
SECONDS_BETWEEN_UPDATES = 1.0


@contextmanager
def best_effort() -> Iterator[None]:
    """Log an error of the Prefect server: what only informs a person never fails a cycle."""
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("not shown in Prefect: %s", error)


class Progress:
    """A bar over `total` of anything, for a step that takes longer than 5 s; a shorter one makes no
    call to the server. At most one call a second, and the last."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, max(total, 1), 0
        self._artifact_id: UUID | None = None
        self._in_order = asyncio.Lock()
        self._due_at = monotonic() + SECONDS_BEFORE_THE_FIRST

    async def advance(self, done: int) -> None:
        """Move the bar by `done`."""
        self._done += done
        is_last = self._artifact_id is not None and self._done >= self._total
        if monotonic() < self._due_at and not is_last:
            return
        self._due_at = monotonic() + SECONDS_BETWEEN_UPDATES
        # Batches end side by side; an older update that arrived last would stay on the bar.
        async with self._in_order:
            with best_effort():
                await self._show(100.0 * self._done / self._total)

    async def _show(self, percent: float) -> None:
        if self._artifact_id is not None:
            await aupdate_progress_artifact(self._artifact_id, percent)
            return
        made = await acreate_progress_artifact(percent, description=self._description)
        self._artifact_id = made if isinstance(made, UUID) else None
