"""The ASGI application: every path of protocol §2 on one origin, and the emulator's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Route

from agent.api.gateway import make_app
from agent.api.hot_load import ACCOUNT, ROUTES
from emulator.api import coreweave_door, deployed_models, extensions, plain_door
from emulator.api.gateway import ordered
from emulator.api.inference import infer, list_models
from emulator.control.settings import EmulatorConfig
from emulator.replicas.service import Service
from hotload.publish.fireworks_names import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    INFERENCE_PREFIX,
    MODELS_PATH,
)

DEPLOYED = f"{ACCOUNT}/deployedModels"


def create_app(config: EmulatorConfig) -> Starlette:
    """Create the application for one service; its lifespan loads the base model and cleans up."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = service = Service(config)
        app.state.instead = ordered
        app.state.hot_loads = {}
        try:
            await service.start()
        except BaseException as error:
            app.state.failure = error  # the server that runs this only says that it failed
            raise
        try:
            yield
        finally:
            await service.stop()

    routes = [
        Route(prefix + path.removeprefix(INFERENCE_PREFIX), endpoint, methods=[method])
        for path, endpoint, method in (
            (COMPLETIONS_PATH, infer, "POST"),
            (CHAT_PATH, infer, "POST"),
            (MODELS_PATH, list_models, "GET"),
        )
        for prefix in (INFERENCE_PREFIX, "")  # the vendor's typed client leaves it out
    ]
    routes += [
        *ROUTES,
        Route(DEPLOYED, deployed_models.list_deployed, methods=["GET"]),
        Route(DEPLOYED, deployed_models.load, methods=["POST"]),
        Route(f"{DEPLOYED}/{{deployed}}", deployed_models.get_deployed, methods=["GET"]),
        Route(f"{DEPLOYED}/{{deployed}}", deployed_models.unload, methods=["DELETE"]),
    ]
    if config.dialect != "fireworks":
        doors = {"plain": plain_door.ROUTES, "coreweave": coreweave_door.ROUTES}
        routes = list(doors[config.dialect])
    routes += [
        Route("/emulator/faults", extensions.add_faults, methods=["POST"]),
        Route("/emulator/faults", extensions.list_faults, methods=["GET"]),
        Route("/emulator/faults", extensions.clear_faults, methods=["DELETE"]),
        Route("/emulator/log", extensions.read_request_log, methods=["GET"]),
        Route("/emulator/log", extensions.clear_log, methods=["DELETE"]),
        Route("/emulator/replicas", extensions.change_replicas, methods=["POST"]),
        Route("/emulator/tick", extensions.tick, methods=["POST"]),
    ]
    return make_app(routes, lifespan)
