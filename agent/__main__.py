"""`python -m agent`: keep one inference server on what its fleet is to serve."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.beside.app import create_agent_app
from agent.beside.engine_replica import EngineReplica
from agent.beside.following import Following
from agent.beside.peers import Peers
from agent.engines.declared import DeclaredServer
from agent.engines.reloading import ReloadingEngine
from agent.engines.sglang import Sglang
from agent.engines.transformers_serve import TransformersServe
from agent.engines.vllm import Vllm
from agent.fleet.addresses import Addresses
from agent.fleet.log import FleetLog
from agent.fleet.settings import (
    add_addresses,
    add_names,
    address,
    positive_count,
    time_span,
)
from agent.fleet.state import NAME
from agent.loading.bucket import SnapshotBucket
from agent.server import LOOPBACK, add_address, serve_app
from hotload.clients.store.store import Store

ABOUT = """
Follows what is signalled to a service through the door (`python -m agent.door`), loads it from the
bucket below --model-dir, checks every tensor, and lets the inference server reload. Start that
server on MODEL_DIR/current. Prints `agent: http://HOST:PORT` when it answers; Ctrl-C ends it.
"""
KEY_VARIABLE = "HOTLOAD_PEER_KEY"
ENGINES: dict[str, Callable[[str], ReloadingEngine]] = {
    "vllm": Vllm,
    "sglang": Sglang,
    "transformers": TransformersServe,
}


def main() -> int:
    """Run the agent the arguments describe; 0 when it was ended, 2 when it could not start."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        engine = _engine(arguments)
        if not re.fullmatch(NAME, arguments.name):
            raise ValueError(f"--name: expected {NAME}, not {arguments.name!r}")
        if arguments.base_model is not None and not arguments.base_model.is_dir():
            raise ValueError(f"--base-model: no directory {arguments.base_model}")
        peers = _peers(arguments)
        store = Store(arguments.bucket, dict(arguments.bucket_option))
        directory = arguments.model_dir.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another agent has {arguments.model_dir}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with lock, ThreadPoolExecutor(1, "load") as threads:
        replica = EngineReplica(
            arguments.name,
            directory,
            SnapshotBucket(store.url, store.options),
            threads,
            engine,
            engine_kind=arguments.engine,
            serves=arguments.serves or (arguments.engine_url if engine.has_address else ""),
            base=arguments.base_model,
            peers=peers,
            workers=arguments.workers,
        )
        log = FleetLog(store, arguments.account, arguments.deployment)
        app = create_agent_app(Following(replica, log, arguments.poll_seconds), peers)
        return serve_app("agent", app, port=arguments.port, host=arguments.host)


def _engine(arguments: argparse.Namespace) -> ReloadingEngine:
    if arguments.engine == "command":
        if not arguments.reload:
            raise ValueError("--engine command needs --reload")
        return DeclaredServer(arguments.engine_url, arguments.reload, arguments.version)
    return ENGINES[arguments.engine](arguments.engine_url)


def _peers(arguments: argparse.Namespace) -> Peers | None:
    if not (arguments.peer or arguments.peers):
        return None
    if not (key := os.environ.get(KEY_VARIABLE)):
        raise ValueError(f"--peer and --peers need a key that all agents share in {KEY_VARIABLE}")
    return Peers(Addresses(arguments.peer, arguments.peers), key)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agent",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_names(parser)
    add("--engine", required=True, choices=[*ENGINES, "command"], help="the server beside it")
    at = f"http://{LOOPBACK}:8000"
    add("--engine-url", default=at, type=address, metavar="URL", help="its address (%(default)s)")
    serves = "where clients ask it (--engine-url, unless only commands are declared)"
    add("--serves", type=address, metavar="URL", help=serves)
    add("--reload", metavar="HOW", help="--engine command: a command, or `POST /path {JSON}`")
    add("--version", metavar="HOW", help="--engine command: likewise, `GET /path field`")
    add("--model-dir", required=True, type=Path, metavar="DIR", help="room for two checkpoints")
    add("--base-model", type=Path, metavar="DIR", help="served before any snapshot")
    add("--name", default=socket.gethostname(), help="one of its own in the fleet (%(default)s)")
    each = "an agent that passes files on, this one as well; repeat, the same list at all"
    add_addresses(parser, "--peer", each)
    add_address(parser)
    add("--poll-seconds", type=time_span, default=2.0, help="between two looks (%(default)s)")
    add(
        "--workers",
        type=positive_count,
        default=os.cpu_count(),
        help="threads of a merge (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
