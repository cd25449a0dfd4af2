"""SGLang, by its weight routes (SGLang 0.5.23)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

from agent.engines.calls import RELOAD_SECONDS, call, version_at
from agent.engines.reloading import Reload, reload_under_way


@dataclass(frozen=True, slots=True)
class Sglang:
    """An SGLang server at `url`."""

    url: str
    tells_version: ClassVar[bool] = True
    has_address: ClassVar[bool] = True

    async def version(self) -> str | None:
        """Ask `/model_info`."""
        return await version_at(self.url, "/model_info")

    async def reload(self, reload: Reload) -> None:
        """Update from disk: between two steps of what is running, or once nothing runs.

        Without a pause the update waits for running requests. Paused ones are taken back to the
        queue where the cache is flushed, since it cannot be while they hold it.
        """
        is_paused = reload.transition == "ASYNC"
        if is_paused:
            mode = "retract" if reload.flushes else "in_place"
            await call(self.url, "POST", "/pause_generation", {"mode": mode})
        body = {
            "model_path": str(reload.directory),
            "weight_version": reload.identity,
            "flush_cache": reload.flushes,
            "abort_all_requests": False,
        }
        path = "/update_weights_from_disk"
        with reload_under_way() if is_paused else nullcontext():
            await call(self.url, "POST", path, body, timeout_seconds=RELOAD_SECONDS)
            if is_paused:
                await call(self.url, "POST", "/continue_generation", {})
