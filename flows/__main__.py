"""The command line: `python -m flows cycle.yaml` runs one cycle in this process."""

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import State
from prefect.blocks.core import Block

from flows.adopt import adopt_base
from flows.command_line import read_input, run_command
from flows.cycle import checkpoint_to_rollout
from flows.cycle_file import parse_cycle_file, save_inline_blocks
from flows.publish import publish_version
from hotload.publish.publication import Publication
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from hotload.trainers.vendor_config import LIMIT_BYTES, translate_config

TRANSLATE = "translate-config"


async def run_declared(spec: CycleSpec, blocks: dict[str, Block]) -> str:
    """Run the cycle of a cycle file, its inline blocks saved beforehand; returns its table.

    Above it stands how the cycle ended, where that is not as usual.
    """
    saved = await save_inline_blocks(spec, blocks)
    state = await checkpoint_to_rollout(saved, return_state=True)
    report = await state.aresult()
    assert isinstance(report, CycleReport)  # Prefect keeps a returned state, and hands on its data
    return "\n".join(
        [*unusual_ending(state), *(f"{row['what']:>24}  {row['value']}" for row in report.rows())]
    )


async def adopt_declared(spec: CycleSpec, blocks: dict[str, Block], identity: str) -> str:
    """Adopt the checkpoint of a cycle file as the served `identity`; returns a line about it."""
    await adopt_base(await save_inline_blocks(spec, blocks), identity)
    return f"{identity} is adopted as {spec.name}; the next version follows it"


async def publish_declared(spec: CycleSpec, blocks: dict[str, Block]) -> str:
    """Publish the version of a cycle file, and sample nothing; returns a line for each service."""
    state = await publish_version(await save_inline_blocks(spec, blocks), return_state=True)
    publication = await state.aresult()
    assert isinstance(publication, Publication)
    lines = (f"{one.service}  {one.describe()}" for one in publication.services)
    return "\n".join([*unusual_ending(state), *lines])


def unusual_ending(state: State[Any]) -> list[str]:
    """Say how a flow ended, where that is not as usual."""
    return [] if state.name == "Completed" else [f"{state.name}: {state.message}"]


def translate(arguments: list[str]) -> int:
    """Print the run file that a recipe's `Config` comes to; 0, or 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog=f"python -m flows {TRANSLATE}",
        description="Translate the Config of the vendor's GRPO recipe into a run file.",
        epilog="The file is read, never run. What has no meaning here is told above the result.",
    )
    parser.add_argument("recipe", type=Path, help="Python with `Config(…)`, or with its class")
    recipe = parser.parse_args(arguments).recipe
    made = read_input(lambda: translate_config(read_bounded(recipe), str(recipe)))
    return show(made.render().rstrip("\n"))


def read_bounded(path: Path) -> bytes:
    """Read a recipe, or as much of a larger file as shows that it is none."""
    with path.open("rb") as file:
        return file.read(LIMIT_BYTES + 1)


def main() -> int:
    """Run one cycle from a cycle file, or adopt its checkpoint.

    0 done, 1 failed or no Prefect server, 2 wrong input and nothing was begun, 130 and 143 stopped
    by Ctrl-C or SIGTERM.
    """
    if sys.argv[1:2] == [TRANSLATE]:
        return translate(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m flows",
        description="Carry one checkpoint to scored rollouts, as a cycle file declares.",
        epilog="A killed cycle goes on where it was when started again with the same file. "
        f"`python -m flows {TRANSLATE} recipe.py` makes a run file of a GRPO recipe.",
    )
    parser.add_argument("cycle_file", type=Path, help="YAML with `cycle:` and `blocks:`")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--publish-only", action="store_true", help="sample nothing")
    what.add_argument(
        "--adopt",
        metavar="IDENTITY",
        help="publish nothing: this checkpoint is what every replica serves under IDENTITY",
    )
    given = parser.parse_args()
    spec, blocks = read_input(lambda: parse_cycle_file(given.cycle_file))
    if given.adopt is not None:
        work = adopt_declared(spec, blocks, given.adopt)
    elif given.publish_only:
        work = publish_declared(spec, blocks)
    else:
        read_input(lambda: spec.to_sample)
        work = run_declared(spec, blocks)
    return run_command(work, show)


def show(text: str) -> int:
    """Print what a command has to say."""
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
