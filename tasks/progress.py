"""Progress: a bar in the Prefect UI for steps that take a person's patience."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

SECONDS_BETWEEN_UPDATES = 1.0


@contextmanager
def best_effort() -> Iterator[None]:
    """What only informs a person never fails a cycle: an error is logged and that is all."""
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("progress is not shown: %s", error)


class Progress:
    """A bar over `total` of anything; at most one call to the server a second, and the last."""

    def __init__(self, artifact_id: UUID | None, total: int) -> None:
        self._artifact_id, self._total, self._done = artifact_id, max(total, 1), 0
        self._in_order = asyncio.Lock()
        self._shown_at = monotonic()

    @classmethod
    async def start(cls, description: str, total: int) -> "Progress":
        """Show the bar at zero."""
        made = None
        with best_effort():
            made = await acreate_progress_artifact(0.0, description=description)
        return cls(made if isinstance(made, UUID) else None, total)

    async def advance(self, done: int) -> None:
        """Move the bar by `done`."""
        self._done += done
        if self._done < self._total and monotonic() - self._shown_at < SECONDS_BETWEEN_UPDATES:
            return
        self._shown_at = monotonic()
        # Batches end side by side; an older update that arrived last would stay on the bar.
        async with self._in_order:
            if self._artifact_id is None:
                return
            with best_effort():
                await aupdate_progress_artifact(self._artifact_id, 100.0 * self._done / self._total)
