"""`python -m blocks check KIND NAME`: does a configured connection work, and what is missing?"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

import httpx

from blocks import require_server
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from hotload.check_line import CheckLine
from hotload.errors import ServiceRefusedError, ServiceUnavailableError

EPILOG = """\
examples:
  python -m blocks check store default
  python -m blocks check service default --store default
  python -m blocks check rollouts default

Blocks are configured in the Prefect UI under Blocks, or saved from Python:
  CheckpointStore(url="s3://bucket/path").save("default")
PREFECT_API_URL says which server to ask. Keys and credentials that a block leaves out come from the
environment: FIREWORKS_API_KEY, FIREWORKS_BASE_URL, COREWEAVE_API_TOKEN, AWS_*,
GOOGLE_APPLICATION_CREDENTIALS.

exit code: 0 everything needed is there, 1 something is missing, 2 no such block, or no server
"""


async def check_block(kind: str, name: str, store_name: str | None) -> list[CheckLine]:
    """Check one saved block, a service's against a store's url when one is named.

    Raises:
        ValueError: the server knows no such block.
        ServiceUnavailableError: no Prefect server answers.
    """
    await require_server()
    if kind == "store":
        return await (await CheckpointStore.load(name)).open().check()
    if kind == "rollouts":
        return await (await RolloutClient.load(name)).open().check()
    service = await HotLoadService.load(name)
    store = await CheckpointStore.load(store_name) if store_name else None
    try:
        client = service.open()
    except ServiceRefusedError as error:
        return [CheckLine("settings", False, error.answer, error.advice)]
    return await client.check(store.url if store else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per question; 0, or 1 when something a cycle needs is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m blocks",
        description="Ask configured blocks whether their connections work.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check")
    check = verbs.add_parser(
        "check",
        help="ask a saved block whether its connection works",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("kind", choices=("service", "store", "rollouts"), help="which kind of block")
    check.add_argument("name", help="the name the block was saved under")
    check.add_argument(
        "--store", metavar="NAME", help="service only: the store it is to be loaded from"
    )
    asked = parser.parse_args(arguments)
    if asked.store and asked.kind != "service":
        parser.error("--store goes with a service")
    try:
        lines = asyncio.run(check_block(asked.kind, asked.name, asked.store))
    except ValueError as error:
        print(f"{asked.name}: {error}", file=sys.stderr)
        return 2
    except (ServiceUnavailableError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    return 1 if any(line.stops and not line.ok for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
