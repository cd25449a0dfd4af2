"""Progress: a bar in the Prefect UI for steps that take a person's patience."""

import asyncio
from time import monotonic
from uuid import UUID

from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

SECONDS_BETWEEN_UPDATES = 1.0


class Progress:
    """A bar over `total` of anything; at most one call to the server a second, and the last."""

    def __init__(self, artifact_id: UUID, total: int) -> None:
        self._artifact_id, self._total, self._done = artifact_id, max(total, 1), 0
        self._in_order = asyncio.Lock()
        self._shown_at = monotonic()

    @classmethod
    async def start(cls, description: str, total: int) -> "Progress":
        """Show the bar at zero."""
        made = await acreate_progress_artifact(0.0, description=description)
        if not isinstance(made, UUID):
            raise TypeError(f"expected an artifact id, found {type(made).__name__}")
        return cls(made, total)

    async def advance(self, done: int) -> None:
        """Move the bar by `done`."""
        self._done += done
        if self._done < self._total and monotonic() - self._shown_at < SECONDS_BETWEEN_UPDATES:
            return
        self._shown_at = monotonic()
        # Batches end side by side; an older update that arrived last would stay on the bar.
        async with self._in_order:
            await aupdate_progress_artifact(self._artifact_id, 100.0 * self._done / self._total)
