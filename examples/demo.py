"""`make demo`: five cycles on one machine, nothing but loopback traffic.

A tiny trainer writes real checkpoints; an emulated service with three replicas loads them; a real
Prefect server runs the cycles. The fourth meets a replica that cannot merge its delta.
Everything lies in `.demo/`, made anew by every run; no process outlives it.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

DEMO = Path(__file__).resolve().parents[1] / ".demo"
SERVER_SECONDS = 120
PROBLEMS = 12
NAMES = {"account_id": "demo", "model_id": "tiny", "deployment_id": "fleet"}


def main() -> int:
    """Run the demo, or serve the Prefect UI of the last one."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--ui", action="store_true", help="serve the UI of the last demo")
    arguments = parser.parse_args()
    # SIGTERM ends the demo as Ctrl-C does: through every `finally`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return look() if arguments.ui else run()
    except KeyboardInterrupt:
        print("\nstopped; every process of the demo has ended", file=sys.stderr)
        return 130


def run() -> int:
    """Five cycles from nothing; the report ends up in `.demo/report.json`."""
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "bucket").mkdir(parents=True)
    started = time.monotonic()
    with prefect_server() as api:
        from examples.five_cycles import run_cycles, write_checkpoints

        say("writing five checkpoints of a tiny Llama (bf16, one layer per file)")
        checkpoints = write_checkpoints(DEMO / "checkpoints")
        with emulator(checkpoints[0]) as service:
            say(f"Prefect at {api}, three replicas at {service}")
            reports = asyncio.run(run_cycles(DEMO, service, checkpoints, NAMES))
    from examples.five_cycles import table

    print(table(reports))
    document = [report.model_dump(mode="json") for report in reports]
    (DEMO / "report.json").write_text(json.dumps(document, indent=1))
    say(f"five cycles in {time.monotonic() - started:.0f} s")
    say(f"report   {DEMO / 'report.json'}")
    say(f"data     {DEMO / 'bucket' / '_hotload' / 'rollouts'}")
    say("the UI   make ui")
    return 0


def look() -> int:
    """Serve the Prefect UI over the last demo's flow runs until Ctrl-C."""
    if not (DEMO / "prefect").is_dir():
        print("no demo has run yet: make demo", file=sys.stderr)
        return 2
    with prefect_server() as api:
        say(f"{api.removesuffix('/api')}/runs    Ctrl-C ends it")
        signal.pause()
    return 0


@contextmanager
def prefect_server() -> Iterator[str]:
    """A Prefect server of the demo's own: free port, own home, SQLite; yields its API address."""
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    # Set before prefect is first imported, so the user's own profile is never read.
    os.environ.update(
        PREFECT_HOME=str(DEMO / "prefect"),
        PREFECT_API_URL=api,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        DO_NOT_TRACK="1",
        PREFECT_LOGGING_LEVEL="WARNING",
    )
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(command, "prefect.log") as server:
        wait_for(f"{api}/health", server, "prefect.log")
        yield api


@contextmanager
def emulator(base_model: Path) -> Iterator[str]:
    """The emulated service with three replicas on `base_model`; yields its address."""
    port = free_port()
    command = ["-m", "emulator", "--bucket", (DEMO / "bucket").as_uri(), "--port", str(port)]
    command += ["--base-model", str(base_model), "--replicas", "3"]
    command += ["--account", "demo", "--model", "tiny", "--deployment", "fleet"]
    with process(command, "emulator.log") as running:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/emulator/log", running, "emulator.log")
        yield url


@contextmanager
def process(command: list[str], log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child of ours in a process group of its own, which ends with the block."""
    DEMO.mkdir(exist_ok=True)
    with (DEMO / log).open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield child
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, ending)
                child.wait(10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def wait_for(url: str, child: subprocess.Popen[bytes], log: str) -> None:
    """Return once `url` answers; fail with the end of the log if the process ends first."""
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urlopen(Request(url), timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    end = (DEMO / log).read_text(errors="replace")[-2000:]
    raise SystemExit(f"{url} does not answer; the end of {log}:\n{end}")


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """One line for the person watching."""
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
