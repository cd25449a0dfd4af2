"""The door's application: the hot-load API, what it sees of its agents, and the canary's watch.

What a door cannot do is refused in words: a 404 says "weights are being swapped" to those who
sample, and they would wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.api.gateway import Endpoint, make_app, operation
from agent.api.hot_load import ACCOUNT, ROUTES
from agent.door.agent_fleet import AgentFleet, DoorConfig
from agent.door.canary import CanaryRule
from agent.failures import RefusedError, json_response
from hotload.clients.store.store import Store
from hotload.publish.fireworks_names import CHAT, COMPLETIONS, INFERENCE_PREFIX, MODELS

WATCH_SECONDS = 1.0
DEPLOYED = f"{ACCOUNT}/deployedModels"
METHODS = ["GET", "POST", "DELETE"]
NO_REQUESTS = "a door carries no requests: ask the inference servers, or what balances them"
NO_ADAPTERS = "adapters are not loaded by agents"

logger = logging.getLogger(__name__)


def create_door(config: DoorConfig, store: Store) -> Starlette:
    """Create the application of a door; its lifespan watches over canaries where there are any."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = fleet = AgentFleet(config, store)
        first_look = asyncio.create_task(_look(fleet))
        watch = asyncio.create_task(_watch(fleet, config.canary)) if config.canary else None
        try:
            yield
        finally:
            for work in filter(None, (first_look, watch)):
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work

    @operation("agents")
    async def list_agents(request: Request) -> Response:
        fleet: AgentFleet = request.app.state.service
        state, seen = await fleet.look()
        shown = [
            {"url": one.url, "problem": one.problem, **one.report.model_dump()} for one in seen
        ]
        return json_response({"agents": shown, "remark": fleet.remark(state)})

    refused = [
        *(
            (prefix + path, NO_REQUESTS)
            for path in (COMPLETIONS, CHAT, MODELS)
            for prefix in (INFERENCE_PREFIX, "")
        ),
        *((path, NO_ADAPTERS) for path in (DEPLOYED, f"{DEPLOYED}/{{deployed}}")),
    ]
    routes = [
        *ROUTES,
        Route("/door/agents", list_agents, methods=["GET"]),
        *(Route(path, _refuse(reason), methods=METHODS) for path, reason in refused),
    ]
    return make_app(routes, lifespan)


def _refuse(reason: str) -> Endpoint:
    """Make the endpoint of what a door cannot do."""

    @operation("refused")
    async def refuse(request: Request) -> Response:
        raise RefusedError(400, reason)

    return refuse


async def _look(fleet: AgentFleet) -> None:
    """Say once what is wrong with the log where nothing was signalled, or it cannot be read."""
    try:
        state, _ = await fleet.look()
    except RefusedError as error:
        logger.warning("%s", error)
    else:
        if remark := fleet.remark(state):
            logger.warning("%s", remark)


async def _watch(fleet: AgentFleet, rule: CanaryRule) -> None:
    while True:
        try:
            await fleet.watch_canary(rule)
        except RefusedError as error:
            logger.warning("canary: %s", error)
        except Exception:  # a canary that nobody watches would wait for ever
            logger.exception("canary: a defect of the door; it is looked at again")
        await asyncio.sleep(WATCH_SECONDS)
