"""`python -m emulator`: a local hot-load service with real weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from emulator.control.faults import FAULTS, InvalidFaultError, read_plan
from emulator.control.settings import EmulatorConfig
from emulator.server import run

ABOUT = """
Serves a base model with N replicas, loads what is signalled from BUCKET/<identity>/ and answers
with the weights each replica really holds. Prints `emulator: http://127.0.0.1:PORT` when it
answers; Ctrl-C ends it.
"""
EXTENSIONS = """
endpoints of the emulator's own (no key needed):
  POST   /emulator/faults    {"fault": NAME, ...} or {"faults": [...]}
  GET    /emulator/faults    ordered faults, with how often each struck
  DELETE /emulator/faults    all, or ?number=N
  GET    /emulator/log       requests, signals, hints, client bugs, snapshots applied per replica
  DELETE /emulator/log       forget requests and hints
  POST   /emulator/replicas  {"action": "add" | "remove" | "restart", "replica": 1,
                             "on_base": false}
  POST   /emulator/tick      {"seconds": 1.0}: move the clock; returns when nothing is left
                             to do until later
  GET    /v1/accounts/A/deployments/D/ledger

example:
  python -m emulator --bucket file:///data/bucket --base-model ./model --replicas 3 --port 8080
"""


def main() -> int:
    """Start the emulator the arguments describe; 0 when it was ended, 2 when it could not start."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        options = dict(pair.split("=", 1) for pair in arguments.bucket_option)
        plan = read_plan(arguments.faults) if arguments.faults else ()
    except (InvalidFaultError, OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.base_identity is not None and arguments.dialect != "plain":
        parser.error("--base-identity goes with --dialect plain")
    config = EmulatorConfig(
        bucket=arguments.bucket,
        base_model=arguments.base_model,
        bucket_options=options,
        bucket_type=arguments.bucket_type,
        base_model_name=arguments.base_model_name,
        replica_count=arguments.replicas,
        port=arguments.port,
        engine=arguments.engine,
        api_key=arguments.api_key,
        account_id=arguments.account,
        model_id=arguments.model,
        deployment_id=arguments.deployment,
        transition=arguments.transition,
        faults=plan,
        work_dir=arguments.work_dir,
        clock=arguments.clock,
        seconds_per_state=arguments.seconds_per_state,
        seconds_per_token=arguments.seconds_per_token,
        latency_seconds=arguments.latency_seconds,
        startup_seconds=arguments.startup_seconds,
        chain_error=arguments.chain_error,
        sync_new_requests=arguments.sync_new_requests,
        hint_status_code=arguments.hint_status,
        reject_reset_prompt_cache=arguments.reject_reset_prompt_cache,
        adapter_slots=arguments.adapter_slots,
        dialect=arguments.dialect,
        base_identity=arguments.base_identity,
    )
    return run(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emulator",
        description=ABOUT,
        epilog=_fault_help() + EXTENSIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bucket", required=True, metavar="URL", help="any fsspec URL snapshots are below")
    add("--bucket-option", action="append", default=[], metavar="KEY=VALUE", help="fsspec option")
    add("--bucket-type", default="S3", help="hotLoadBucketType to show (%(default)s)")
    add(
        "--base-model", required=True, type=Path, metavar="DIR", help="Hugging Face model directory"
    )
    add("--base-model-name", help="baseModel to show (accounts/fireworks/models/<DIR>)")
    add("--replicas", type=_count, default=3, metavar="N", help="serving copies (%(default)s)")
    add("--port", type=int, default=0, help="loopback port; 0 takes a free one")
    add("--engine", choices=_choices("engine"), default="numpy", help="what answers (%(default)s)")
    add("--api-key", help="the only key accepted; without it any non-empty one")
    for name in ("account", "model", "deployment"):
        default = getattr(EmulatorConfig, f"{name}_id")
        add(f"--{name}", default=default, metavar="ID", help="(%(default)s)")
    add(
        "--dialect", choices=_choices("dialect"), default="fireworks", help="the door (%(default)s)"
    )
    add("--base-identity", metavar="ID", help="name of the base weights; no other full is taken")
    add("--transition", choices=_choices("transition"), default="ASYNC", help="how weights swap")
    add("--faults", type=Path, metavar="PLAN", help="YAML list of faults, see below")
    add("--work-dir", type=Path, metavar="DIR", help="where replicas keep their bytes (temporary)")
    add("--clock", choices=_choices("clock"), default="real", help="ticks: only by POST tick")
    waits = {
        "--seconds-per-state": "a replica stays in each stage; replica i 1 + i/2 times as long",
        "--seconds-per-token": "between two tokens of an answer",
        "--latency-seconds": "before the first token of an answer",
        "--startup-seconds": "until the replicas are listed",
    }
    for name, meaning in waits.items():
        add(name, type=_seconds, default=0.0, metavar="F", help=f"{meaning} (0)")
    add("--chain-error", choices=_choices("chain_error"), default="400", help="a refused delta is")
    modes = _choices("sync_new_requests")
    add("--sync-new-requests", choices=modes, default="reject", help="during a SYNC swap")
    codes = get_args(get_type_hints(EmulatorConfig)["hint_status_code"])
    add("--hint-status", type=int, choices=codes, default=200, help="how hints are answered")
    add("--adapter-slots", type=_count, default=1, metavar="N", help="adapters side by side (1)")
    add("--reject-reset-prompt-cache", action="store_true", help="400 for that field of a signal")
    return parser


def _fault_help() -> str:
    lines = [
        "faults (all take count, after, replica, identity):",
        *(
            f"  {name:17} {kind.tells}{_defaults(kind.parameters)}"
            for name, kind in sorted(FAULTS.items())
        ),
    ]
    return "\n".join(lines) + "\n"


def _defaults(parameters: object) -> str:
    return f" {parameters}" if parameters else ""


def _choices(field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(EmulatorConfig)[field])


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
