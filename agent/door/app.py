"""The door's application: the hot-load API, what it sees of its agents, and the canary's watch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.api.gateway import make_app, operation
from agent.api.hot_load import ROUTES
from agent.door.agent_fleet import AgentFleet, DoorConfig
from agent.door.canary import CanaryRule
from agent.failures import RefusedError, json_response
from hotload.clients.store.store import Store

WATCH_SECONDS = 1.0

logger = logging.getLogger(__name__)


def create_door(config: DoorConfig, store: Store) -> Starlette:
    """Create the application of a door; its lifespan watches over canaries where there are any."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = fleet = AgentFleet(config, store)
        watch = asyncio.create_task(_watch(fleet, config.canary)) if config.canary else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch

    @operation("agents")
    async def list_agents(request: Request) -> Response:
        _, seen = await request.app.state.service.look()
        shown = [
            {"url": one.url, "problem": one.problem, **one.report.model_dump()} for one in seen
        ]
        return json_response({"agents": shown})

    routes = [*ROUTES, Route("/door/agents", list_agents, methods=["GET"])]
    return make_app(routes, lifespan)


async def _watch(fleet: AgentFleet, rule: CanaryRule) -> None:
    while True:
        try:
            await fleet.watch_canary(rule)
        except RefusedError as error:
            logger.warning("canary: %s", error)
        await asyncio.sleep(WATCH_SECONDS)
