"""The command line: `python -m flows cycle.yaml` runs one cycle in this process."""

import argparse
import asyncio
import sys
from pathlib import Path

from prefect.blocks.core import Block
from prefect.exceptions import TerminationSignal

from flows.cycle import checkpoint_to_rollout
from flows.cycle_file import parse_cycle_file, save_inline_blocks
from hotload.errors import HotLoadError
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec


async def run_declared(spec: CycleSpec, blocks: dict[str, Block]) -> CycleReport:
    """Run the cycle of a cycle file, its inline blocks saved beforehand; returns its report."""
    report = await checkpoint_to_rollout(await save_inline_blocks(spec, blocks))
    assert isinstance(report, CycleReport)  # Prefect keeps a returned state, and hands on its data
    return report


def main() -> int:
    """Run one cycle from a cycle file.

    0 done, 1 failed, 2 wrong input and nothing was begun, 130 and 143 stopped by Ctrl-C or SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flows",
        description="Carry one checkpoint to scored rollouts, as a cycle file declares.",
        epilog="A killed cycle goes on where it was when started again with the same file.",
    )
    parser.add_argument("cycle_file", type=Path, help="YAML with `cycle:` and `blocks:`")
    try:
        spec, blocks = parse_cycle_file(parser.parse_args().cycle_file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report = asyncio.run(run_declared(spec, blocks))
    except (OSError, HotLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, TerminationSignal) as signal:
        print("stopped; start it again to go on", file=sys.stderr)
        return 143 if isinstance(signal, TerminationSignal) else 130
    print("\n".join(f"{row['what']:>24}  {row['value']}" for row in report.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
