"""What an agent answers: a report, a wish that it looks now, and files for its peers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.beside.following import Following
from agent.beside.offer import offer
from agent.beside.peers import Peers
from agent.failures import json_response
from agent.fleet.report import LOOK_PATH, REPORT_PATH

logger = logging.getLogger(__name__)


def _end_with_it(work: asyncio.Task[None]) -> None:
    """End the process with what it is there for: what starts it again begins from the disk."""
    if not work.cancelled() and (error := work.exception()) is not None:
        logger.error("the agent ends", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


def create_agent_app(following: Following, peers: Peers | None = None) -> Starlette:
    """Create the application of an agent; its lifespan follows the log."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(following.follow())
        work.add_done_callback(_end_with_it)
        try:
            yield
        finally:
            work.cancel()
            following.replica.stop()
            with suppress(asyncio.CancelledError):
                await work

    async def report(request: Request) -> Response:
        return json_response(following.replica.report().model_dump())

    async def look(request: Request) -> Response:
        following.look()
        return json_response({}, 202)

    routes = [
        Route(REPORT_PATH, report, methods=["GET"]),
        Route(LOOK_PATH, look, methods=["POST"]),
    ]
    if peers is not None:
        routes.append(offer(peers, following))
    return Starlette(routes=routes, lifespan=lifespan)
