"""The two servers of the demo and the benchmarks: child processes that never outlive us."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 120
# Prefect's server writes every event in a transaction of its own; on SQLite a flow that starts in
# between is told "locked" and waits 2 s. In batches it meets the lock once in seconds.
IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "4",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "5",
}
END_SECONDS = 10


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server on a free port, its SQLite file in `home`; yields the API's address.

    The environment is set for this process too, so it has to be entered before prefect is imported:
    the user's own profile is never read.
    """
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    os.environ.update(
        IN_BATCHES,
        PREFECT_HOME=str(home),
        PREFECT_API_URL=api,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        # The UI has every line; the terminal is for the demo's own.
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
        DO_NOT_TRACK="1",
    )
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(command, home / "server.log", f"{api}/health"):
        yield api
        if "prefect" in sys.modules:
            from prefect.logging.handlers import APILogWorker

            # While there is a server to take the last lines.
            APILogWorker.drain_all(timeout=END_SECONDS)


@contextmanager
def emulator(
    bucket: str, base_model: Path, log: Path, options: Sequence[str] = ()
) -> Iterator[str]:
    """An emulated service on a free port; yields its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["-m", "emulator", "--bucket", bucket, "--base-model", str(base_model)]
    command += ["--port", str(port), *options]
    with process(command, log, f"{address}/emulator/log"):
        yield address


@contextmanager
def process(arguments: Sequence[str], log: Path, answers_at: str) -> Iterator[None]:
    """A child of this interpreter in a process group of its own, from its first answer on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait_for(answers_at, child, log)
        yield
    finally:
        _end(child)


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urlopen(url, timeout=START_SECONDS):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    end = log.read_text(errors="replace")[-2000:]
    raise SystemExit(f"{url} does not answer; the end of {log}:\n{end}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the whole group: politely first, then for certain."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, ending)
            child.wait(END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
