"""A door that nobody else can ask: what it does, it does in the process of its only client."""

from __future__ import annotations

from typing import Any

import httpx

from agent.api.gateway import make_app
from agent.api.hot_load import ROUTES
from agent.door.agent_fleet import AgentFleet, DoorConfig
from hotload.clients.store.store import Store

ORIGIN = "http://agents"
"""An address that leads nowhere else; what stands in it is said in errors."""


class InProcessDoor(httpx.AsyncBaseTransport):
    """Answers the calls of one client over a service's agents; may be pickled.

    Like any door it keeps nothing but the log in the store. A canary is begun and judged by doors
    that run all the time, so here there is none.
    """

    def __init__(self, config: DoorConfig, store: Store) -> None:
        self._made_of = (config, store)
        self._app = make_app(ROUTES, lifespan=None)
        self._app.state.service = AgentFleet(config, store)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer as a door does that is asked over the network."""
        answers = httpx.ASGITransport(self._app, raise_app_exceptions=False)  # 500, as over a port
        return await answers.handle_async_request(request)
