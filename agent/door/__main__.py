"""`python -m agent.door`: the hot-load API over any number of agents."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from agent.door.agent_fleet import DoorConfig
from agent.door.app import create_door
from agent.door.canary import CanaryRule, CanarySnapshot
from agent.door.gate_file import read_gate
from agent.door.sample_gate import KEY_VARIABLE as GATE_KEY_VARIABLE
from agent.door.sample_gate import SampleGate
from agent.fleet.addresses import Addresses
from agent.fleet.settings import add_addresses, add_names, time_span
from agent.fleet.validation import BaseModel
from agent.loading.disk import Transition
from agent.server import add_address, serve_app
from hotload.clients.store.store import Store
from hotload.errors import HotLoadError
from hotload.sampling.user_function import import_function

KEY_VARIABLE = "HOTLOAD_DOOR_KEY"
ABOUT = f"""
Answers signal, status, ledger and description (docs/protocol.md) for the agents that are listed by
--agent, or found by --agents. It keeps nothing but a log below _hotload/fleets/ in the bucket: any
number of doors may run. {KEY_VARIABLE} is the key it asks for; TLS is a proxy's in front of it.
{GATE_KEY_VARIABLE} is the key that --gate-samples sends to the servers, where they ask for one.
Prints `door: http://HOST:PORT` when it answers; Ctrl-C ends it.
"""


def main() -> int:
    """Run the door the arguments describe; 0 when it was ended, 2 when it could not start."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        store = Store(arguments.bucket, dict(arguments.bucket_option))
        if not (arguments.agent or arguments.agents):
            raise ValueError("name agents by --agent or --agents")
        if not 0 < arguments.quorum <= 1:
            raise ValueError(f"--quorum: expected more than 0, at most 1, not {arguments.quorum}")
        config = DoorConfig(
            bucket=store.url,
            bucket_options=store.options,
            bucket_type=arguments.bucket_type,
            base_model_name=arguments.base_model_name,
            api_key=os.environ.get(KEY_VARIABLE) or None,
            account_id=arguments.account,
            model_id=arguments.model,
            deployment_id=arguments.deployment,
            transition=arguments.transition,
            addresses=Addresses(arguments.agent, arguments.agents),
            quorum=arguments.quorum,
            canary=_canary(arguments),
            base_model=_base_model(arguments.base_model),
        )
    except (HotLoadError, OSError, ValueError) as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return serve_app("door", create_door(config, store), port=arguments.port, host=arguments.host)


def _canary(arguments: argparse.Namespace) -> CanaryRule | None:
    if arguments.canary is None:
        if arguments.gate is not None or arguments.gate_samples is not None:
            raise ValueError("--gate and --gate-samples go with --canary")
        return None
    sys.path.insert(0, os.getcwd())  # of the user's functions
    gate: Callable[[CanarySnapshot], Any] | None = None
    if arguments.gate is not None:
        gate = import_function(arguments.gate, {}, _refuse_gate, positional_count=1)
    elif arguments.gate_samples is not None:
        gate = asyncio.run(SampleGate.open(read_gate(arguments.gate_samples)))
    return CanaryRule(arguments.canary, gate, arguments.gate_seconds, arguments.judge_again)


def _refuse_gate(name: str, reason: str) -> HotLoadError:
    return HotLoadError(f"--gate {name}: {reason}")


def _base_model(directory: Path | None) -> BaseModel | None:
    return BaseModel.read(directory.name, directory) if directory is not None else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agent.door",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_names(parser)
    add("--model", default=DoorConfig.model_id, metavar="ID", help="of the model (%(default)s)")
    add_addresses(parser, "--agent", "an agent's address; repeat")
    add("--quorum", type=float, default=1.0, help="of agents that a signal needs (%(default)s)")
    add("--canary", type=float, metavar="FRACTION", help="of agents that load first")
    gates = parser.add_mutually_exclusive_group().add_argument
    gates("--gate", metavar="MODULE:FUNCTION", help="lets the others follow, or calls back")
    gates("--gate-samples", type=Path, metavar="FILE", help="a gate by samples (docs/agent.md)")
    seconds = "until canaries are ready, and again until the gate has judged (%(default)s)"
    add("--gate-seconds", type=time_span, default=600.0, help=seconds)
    add("--judge-again", action="store_true", help="also what a gate has refused by its bytes")
    add("--transition", choices=get_args(Transition), default="ASYNC", help="how weights swap")
    add("--base-model", type=Path, metavar="DIR", help="what a full snapshot is compared with")
    add("--base-model-name", help="baseModel to show")
    add("--bucket-type", default="S3", help="hotLoadBucketType to show (%(default)s)")
    add_address(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
