"""`transformers serve` (5.24): models are loaded by path, kept by that name, and reset together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agent.engines.calls import RELOAD_SECONDS, call
from agent.engines.reloading import EngineError, Reload, reload_under_way


@dataclass(frozen=True, slots=True)
class TransformersServe:
    """A server at `url`, whose clients name the agent's link as the model. It has no pause and no
    prefix cache across requests, and tells no version: that it answers is all that is known."""

    url: str
    tells_version: ClassVar[bool] = False
    has_address: ClassVar[bool] = True

    async def version(self) -> str | None:
        """Ask `/health`, which says nothing of weights."""
        await call(self.url, "GET", "/health")
        return None

    async def reload(self, reload: Reload) -> None:
        """Forget every loaded model, then load the link again, where it leads now."""
        await call(self.url, "POST", "/reset")
        body = {"model": str(reload.directory)}
        path = "/load_model"
        with reload_under_way():
            events = await call(self.url, "POST", path, body, timeout_seconds=RELOAD_SECONDS)
        if '"ready"' not in str(events):
            raise EngineError(f"POST {path}: not ready: {str(events)[-300:]}")
