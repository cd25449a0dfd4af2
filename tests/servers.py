"""Real servers on loopback for the tests: Prefect's API, an S3 and a GCS store.

A session starts a server only if one of its tests asks for the fixture, and before its first test
runs: pure tests pay nothing, and no test's time limit pays for a start. Servers live in process
groups of their own that end with the session, however it ends. The environment is set while
pytest starts, because Prefect and gcsfs read it when they are imported.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from examples.processes import IN_BATCHES

if TYPE_CHECKING:
    from emulator.control.settings import EmulatorConfig
    from emulator.server import RunningEmulator

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0
DRAIN_SECONDS = 20.0
BUCKET = "hotload-test"
# The group ends when the pipe to us closes, so a killed pytest leaves nothing behind.
SHEPHERD = '{ "$@"; kill -9 -$$; } & read -r _; kill -9 -$$'


@dataclass(frozen=True)
class StoreServer:
    """A running object store with one empty bucket: its fsspec URL and fsspec options."""

    url: str
    options: Mapping[str, object]


class LoopbackServer:
    """One server process on a port of its own; the port is kept from the first moment on."""

    def __init__(self, name: str, directory: Path, command: Callable[[int], list[str]]) -> None:
        self.log = directory / f"{name}.log"
        self._name, self._command = name, command
        self._reserved = socket.socket()  # bound, never listening: until the start, refused
        self.port = 0
        while not self.port:  # below what the system hands out: nobody gets it while it starts
            port = 20_000 + secrets.randbelow(12_000)
            with suppress(OSError):
                self._reserved.bind(("127.0.0.1", port))
                self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it answers, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The number of the process that holds the group, while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process once; does not wait."""
        if self._process is not None:
            return
        refuse_unmarked(self._name)
        self._reserved.close()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", SHEPHERD, "sh", *self._command(self.port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when it answers HTTP; RuntimeError with the end of its log when it does not."""
        assert self._process is not None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                opener.open(self.address, timeout=START_SECONDS).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.05)
            else:
                return
        self.stop()
        tail = self.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self._name} did not start:\n{tail}")

    def stop(self) -> None:
        """Kill the whole process group; safe to repeat. It may be started again on its port."""
        self._reserved.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
        self._process = None


def _prefect(port: int) -> list[str]:
    url = os.environ.get("HOTLOAD_TEST_DATABASE")  # of tests/postgres.py; else SQLite
    return [
        *(["env", f"PREFECT_SERVER_DATABASE_CONNECTION_URL={url}"] if url else []),
        *(sys.executable, "-m", "prefect", "server", "start"),
        *("--no-ui", "--host", "127.0.0.1", "--port", str(port)),
    ]


def _moto(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _gcs(port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", "--in-memory"),
        *("--host", "127.0.0.1", "--port", str(port), "--default-bucket", BUCKET),
    ]


COMMANDS = {"prefect_api": _prefect, "s3_server": _moto, "gcs_server": _gcs}
SLOW = (
    *("tests/conformance", "tests/fuzz", "tests/blocks/test_bad_days.py"),
    *("tests/hotload/test_math_answer.py", "tests/hotload/test_bad_seconds.py"),
    *("tests/test_benchmarks.py", "tests/test_conformance_kit.py", "tests/test_packaging.py"),
)
SERVERS = pytest.StashKey[dict[str, LoopbackServer]]()
DIRECTORY = pytest.StashKey[Path]()
_unmarked: str | None = None  # the running test, if it may start no server


def pytest_configure(config: pytest.Config) -> None:
    """Reserve the ports and set the environment, before anything reads it."""
    directory = config.stash[DIRECTORY] = Path(tempfile.mkdtemp(prefix="hotload-tests-"))
    servers = config.stash[SERVERS] = {
        name: LoopbackServer(name, directory, command) for name, command in COMMANDS.items()
    }
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "AWS_", "GOOGLE_", "FIREWORKS_")):
            del os.environ[name]
    os.environ |= {
        **IN_BATCHES,
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(directory / "prefect"),
        "PREFECT_API_URL": f"{servers['prefect_api'].address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_CLI_PROMPT": "false",
        "AWS_ACCESS_KEY_ID": "hotload-test-key",
        "AWS_SECRET_ACCESS_KEY": "hotload-test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else each call waits 60 s
        "NO_GCE_CHECK": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out: what asks for a server, and whole folders."""
    for item in items:
        if any(item.path.is_relative_to(ROOT / each) for each in SLOW):
            item.add_marker("slow")
        if {*COMMANDS, "emulators"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let servers start from here on if the test is marked."""
    global _unmarked
    _unmarked = None if item.get_closest_marker("server") else item.nodeid


def refuse_unmarked(name: str) -> None:
    """Fail a test that starts a server without the mark, or `make test-fast` would start it."""
    if _unmarked is not None:
        pytest.fail(f"{_unmarked} starts {name}: mark it with pytest.mark.server")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Start what the collected tests ask for, all at once, and wait until it answers."""
    if session.config.option.collectonly:
        return
    asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    started = [server for name, server in session.config.stash[SERVERS].items() if name in asked]
    try:
        for server in started:
            server.start()
        for server in started:
            server.wait()
    except (OSError, RuntimeError) as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.INTERNAL_ERROR)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End every server and remove what they wrote."""
    if "prefect.logging" in sys.modules:  # else it offers its last lines to nobody for a minute
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=DRAIN_SECONDS)
    for server in config.stash.get(SERVERS, {}).values():
        server.stop()
    if DIRECTORY in config.stash:
        shutil.rmtree(config.stash[DIRECTORY], ignore_errors=True)


def _running(config: pytest.Config, name: str) -> str:
    server = config.stash[SERVERS][name]
    server.start()  # for a fixture asked for by getfixturevalue, which collection does not see
    server.wait()
    return server.address


def serve(config: EmulatorConfig) -> RunningEmulator:
    """Start an emulator in a thread; a context manager that stops it."""
    from emulator import server

    refuse_unmarked("an emulator")
    return server.serve(config)


@pytest.fixture(scope="session")
def emulators() -> Callable[[EmulatorConfig], RunningEmulator]:
    """Start emulators; marks the test as one with a server."""
    return serve


@pytest.fixture(scope="session")
def prefect_api(pytestconfig: pytest.Config) -> str:
    """The URL of a running Prefect API with an empty database, also in PREFECT_API_URL."""
    return f"{_running(pytestconfig, 'prefect_api')}/api"


@pytest.fixture(scope="session")
def s3_server(pytestconfig: pytest.Config) -> StoreServer:
    """A running S3 store with one bucket; the credentials are in the environment."""
    import boto3

    address = _running(pytestconfig, "s3_server")
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket=BUCKET)
    client.close()
    return StoreServer(f"s3://{BUCKET}", {"endpoint_url": address})


@pytest.fixture(scope="session")
def gcs_server(pytestconfig: pytest.Config) -> StoreServer:
    """A running GCS store with one bucket; one client at a time, it has a single thread."""
    address = _running(pytestconfig, "gcs_server")
    return StoreServer(f"gs://{BUCKET}", {"endpoint_url": address, "token": "anon"})
