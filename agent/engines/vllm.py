"""vLLM, by the routes of its development mode (vLLM 0.33, `VLLM_SERVER_DEV_MODE=1`).

They lie outside what `--api-key` guards: the server has to listen on loopback, or behind a proxy
that lets nobody else to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agent.engines.calls import RELOAD_SECONDS, call, version_at
from agent.engines.reloading import Reload, reload_under_way


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM server at `url`. One that fails after the pause stays paused: half of its weights may
    be new."""

    url: str
    tells_version: ClassVar[bool] = True
    has_address: ClassVar[bool] = True

    async def version(self) -> str | None:
        """Ask `/weight_info`."""
        return await version_at(self.url, "/weight_info")

    async def reload(self, reload: Reload) -> None:
        """Pause, reload in place, name the version, drop what the old weights computed, resume.

        A pause by itself would drop it once running requests have ended, whatever the policy.
        Requests that were frozen begin again with the new weights where prefixes are dropped: a
        reset while their blocks are held would not happen. Prefixes of a cache elsewhere and what
        an image was encoded to go with them; a server without either takes the calls all the same.
        """
        mode = "keep" if reload.transition == "ASYNC" else "wait"
        await self._post(f"/pause?mode={mode}&clear_cache=false")
        arguments = {"weights_path": str(reload.directory)}
        with reload_under_way():
            await self._post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            await self._post("/update_weight_version", {"new_version": reload.identity})
            if reload.flushes:
                flags = "reset_running_requests=true&reset_external=true"
                await self._post(f"/reset_prefix_cache?{flags}")
                await self._post("/reset_encoder_cache")
            await self._post("/resume")

    async def _post(self, path: str, body: object = None) -> None:
        await call(self.url, "POST", path, body, timeout_seconds=RELOAD_SECONDS)
