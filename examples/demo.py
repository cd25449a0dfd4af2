"""`make demo`: five cycles on this machine, with nothing but loopback traffic.

A tiny trainer writes real checkpoints; an emulated service with three replicas loads them; a real
Prefect server runs the cycles. In the fourth, one replica cannot merge its delta. Everything lies
in `.demo/`, made anew by every run, and no process outlives it, unless it is killed with -9.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from examples.processes import emulator, prefect_server

DEMO = Path(__file__).resolve().parents[1] / ".demo"
NAMES = {"account_id": "demo", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--account", "demo", "--model", "tiny", "--deployment", "fleet"]


def main() -> int:
    """Run the demo, or serve the Prefect UI of the last one."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ui", action="store_true", help="show the last demo in the Prefect UI")
    look_only = parser.parse_args().ui
    # SIGTERM and a closed terminal end the demo as Ctrl-C does: through every `finally`.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        return look() if look_only else run()
    except KeyboardInterrupt:
        print("\nstopped; every process of the demo has ended", file=sys.stderr)
        return 130


def run() -> int:
    """Five cycles from nothing; the table on the terminal, the same in `.demo/report.json`."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    bucket = DEMO / "bucket"
    bucket.mkdir(parents=True)
    say("starting a Prefect server")
    with prefect_server(DEMO / "prefect") as api:
        # Imported here: prefect reads its settings when it is imported.
        from examples.five_cycles import run_cycles, table, write_checkpoints

        say("writing six checkpoints of a tiny Llama (bf16, one layer a file)")
        checkpoints = write_checkpoints(DEMO / "checkpoints")
        with emulator(bucket.as_uri(), checkpoints[0], DEMO / "emulator.log", FLEET) as service:
            say(f"Prefect at {api}, three replicas at {service}")
            reports = asyncio.run(run_cycles(DEMO, service, checkpoints, NAMES))
    print(table(reports))
    document = [report.model_dump(mode="json") for report in reports]
    (DEMO / "report.json").write_text(json.dumps(document, indent=1))
    say(f"{len(reports)} cycles; {time.monotonic() - started:.0f} s with both servers' start")
    say(f"report  {DEMO / 'report.json'}")
    say(f"page    {bucket / '_hotload' / 'reports' / reports[-1].name}.html")
    say(f"data    {bucket / '_hotload' / 'rollouts'}")
    say("UI      make ui")
    return 0


def look() -> int:
    """Serve the Prefect UI over the last demo's flow runs until Ctrl-C."""
    if not (DEMO / "report.json").is_file():
        print("no demo has run to its end yet: make demo", file=sys.stderr)
        return 2
    with prefect_server(DEMO / "prefect") as api:
        say(f"{api.removesuffix('/api')}/runs  (Ctrl-C ends it)")
        signal.pause()
    return 0


def say(text: str) -> None:
    """One line for the person watching."""
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
