"""The loopback servers answer, keep bytes, and end with the session that started them."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import httpx
import psutil
import pytest

from tests.servers import LoopbackServer, StoreServer
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
PAYLOAD = bytes(range(256)) * 300


def test_the_prefect_api_is_the_one_that_the_client_talks_to(prefect_api: str) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    assert httpx.get(f"{prefect_api}/health", timeout=PATIENCE_SECONDS).json() is True
    assert PREFECT_API_URL.value() == prefect_api
    assert PREFECT_HOME.value() == Path(os.environ["PREFECT_HOME"])


def test_the_prefect_server_sends_no_telemetry(prefect_api: str) -> None:
    settings = httpx.get(f"{prefect_api}/admin/settings", timeout=PATIENCE_SECONDS).json()
    assert settings["server"]["analytics_enabled"] is False


@pytest.mark.server
@pytest.mark.parametrize("server", ["s3_server", "gcs_server"])
def test_a_store_gives_back_what_was_put(server: str, request: pytest.FixtureRequest) -> None:
    store: StoreServer = request.getfixturevalue(server)
    files, root = fsspec.url_to_fs(store.url, **store.options)
    files.pipe_file(f"{root}/servers/a.bin", PAYLOAD)
    assert files.cat_file(f"{root}/servers/a.bin") == PAYLOAD
    assert files.cat_file(f"{root}/servers/a.bin", start=10, end=20) == PAYLOAD[10:20]
    assert [Path(name).name for name in files.ls(f"{root}/servers")] == ["a.bin"]
    files.rm(f"{root}/servers/a.bin")


def file_server(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]


SESSION = """
import pathlib, sys
from tests.servers import LoopbackServer
from tests.test_servers import file_server
server = LoopbackServer("files", pathlib.Path(sys.argv[1]), file_server)
server.start()
server.wait()
print(server.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.server
def test_a_server_ends_with_the_session_even_when_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SESSION, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as session:
        assert session.stdout is not None
        port = int(session.stdout.readline())
        children = psutil.Process(session.pid).children(recursive=True)
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE_SECONDS).status_code == 200
        session.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_SECONDS)
    assert not alive


@pytest.mark.server
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = LoopbackServer(
        "broken", tmp_path, lambda port: [sys.executable, "-c", f"raise OSError('no port {port}')"]
    )
    server.start()
    with pytest.raises(
        RuntimeError, match=rf"(?s)broken did not start.*no port {server.port}"
    ) as info:
        server.wait()
    assert "Traceback" in str(info.value)


@pytest.mark.server
def test_before_its_start_a_port_refuses_and_is_kept(tmp_path: Path) -> None:
    server = LoopbackServer("files", tmp_path, file_server)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address, timeout=PATIENCE_SECONDS)
    server.start()
    server.wait()
    assert httpx.get(server.address, timeout=PATIENCE_SECONDS).status_code == 200
    server.stop()
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address, timeout=PATIENCE_SECONDS)
