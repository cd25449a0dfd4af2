"""What each kind of engine is sent, in which order, and what of its answers is an error."""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.engines import declared
from agent.engines.calls import call
from agent.engines.declared import DeclaredServer
from agent.engines.reloading import EngineAwayError, EngineError, Reload
from agent.engines.sglang import Sglang
from agent.engines.transformers_serve import TransformersServe
from agent.engines.vllm import Vllm
from tests.agent.tiny_engine import TinyEngine, digests, serve, tiny_engine
from tests.scripted_server import endless

pytestmark = pytest.mark.server


@pytest.fixture
def engine() -> Iterator[TinyEngine]:
    with tiny_engine() as running:
        yield running


@pytest.fixture
def weights(checkpoints: list[Path]) -> Path:
    return checkpoints[1]


async def test_vllm_is_paused_reloaded_named_flushed_and_resumed(
    engine: TinyEngine, weights: Path
) -> None:
    vllm = Vllm(engine.url)
    assert await vllm.version() is None
    await vllm.reload(Reload(weights, "run-1"))
    assert (await vllm.version(), engine.is_paused) == ("run-1", False)
    assert engine.serves == digests(weights)
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
    assert engine.calls[1:-1] == [
        ("/pause?mode=keep&clear_cache=false", None),
        ("/collective_rpc", rpc),
        ("/update_weight_version", {"new_version": "run-1"}),
        ("/reset_prefix_cache?reset_running_requests=true&reset_external=true", None),
        ("/reset_encoder_cache", None),
        ("/resume", None),
    ]
    engine.calls.clear()
    await vllm.reload(Reload(weights, "run-2", "SYNC", "none"))
    paths = [path for path, _ in engine.calls]
    pause = "/pause?mode=wait&clear_cache=false"
    assert paths == [pause, "/collective_rpc", "/update_weight_version", "/resume"]


async def test_a_pause_reads_no_certificates(
    engine: TinyEngine, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them takes longer than all the calls of a pause together."""
    vllm, read = Vllm(engine.url), 0
    await vllm.version()
    made = ssl.create_default_context

    def counted(**how: Any) -> ssl.SSLContext:
        nonlocal read
        read += 1
        return made(**how)

    monkeypatch.setattr(ssl, "create_default_context", counted)
    await vllm.reload(Reload(weights, "run-1"))
    assert read == 0


async def test_vllm_that_fails_in_between_stays_paused(engine: TinyEngine, weights: Path) -> None:
    engine.refuses = {"/collective_rpc"}
    with pytest.raises(EngineError, match=r"POST /collective_rpc: 500: .*illegal memory"):
        await Vllm(engine.url).reload(Reload(weights, "run-1"))
    assert engine.is_paused


async def test_a_flush_that_did_not_happen_is_an_error(engine: TinyEngine, weights: Path) -> None:
    engine.is_unflushed = True
    with pytest.raises(EngineError, match="POST /reset_prefix_cache"):
        await Vllm(engine.url).reload(Reload(weights, "run-1"))
    assert engine.is_paused


@pytest.mark.parametrize(
    ("transition", "policy", "mode"),
    [
        ("ASYNC", "all", "retract"),
        ("ASYNC", "new_session", "retract"),
        ("ASYNC", "none", "in_place"),
        ("SYNC", "all", None),
    ],
)
async def test_sglang_updates_from_disk_by_name(
    engine: TinyEngine, weights: Path, transition: Any, policy: str, mode: str | None
) -> None:
    await Sglang(engine.url).reload(Reload(weights, "run-1", transition, policy))
    assert await Sglang(engine.url).version() == "run-1"
    update = {
        "model_path": str(weights),
        "weight_version": "run-1",
        "flush_cache": policy != "none",
        "abort_all_requests": False,
    }
    calls = [("/update_weights_from_disk", update)]
    if mode:
        calls = [("/pause_generation", {"mode": mode}), *calls, ("/continue_generation", {})]
    assert engine.calls[:-1] == calls


async def test_transformers_forgets_and_loads_again(engine: TinyEngine, weights: Path) -> None:
    serve = TransformersServe(engine.url)
    await serve.reload(Reload(weights, "run-1"))
    assert engine.calls == [("/reset", None), ("/load_model", {"model": str(weights)})]
    assert engine.serves == digests(weights)
    assert (serve.tells_version, await serve.version()) == (False, None)


async def test_what_a_command_prints_is_told_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_API_KEY", "abcdefgh-secret")
    script = "import os; raise SystemExit('no engine takes ' + os.environ['ENGINE_API_KEY'])"
    failing = DeclaredServer("", f'{sys.executable} -c "{script}"')
    with pytest.raises(EngineError, match=r"exit status 1: no engine takes \*+$"):
        await failing.reload(Reload(tmp_path, "run-1"))


async def test_a_command_gets_directory_and_name(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'w').write(' '.join(sys.argv[2:]))"
    told = tmp_path / "told"
    declared = DeclaredServer(
        "",
        f'{sys.executable} -c "{script}" {told} {{directory}} {{identity}} {{transition}}',
        f"cat {told}",
    )
    await declared.reload(Reload(tmp_path, "run-1", "SYNC"))
    assert await declared.version() == f"{tmp_path} run-1 SYNC"
    failing = DeclaredServer("", f"{sys.executable} -c \"raise SystemExit('no room')\"")
    with pytest.raises(EngineError, match="exit status 1: no room"):
        await failing.reload(Reload(tmp_path, "run-1"))
    with pytest.raises(EngineError, match="no-such-command"):
        await DeclaredServer("", "no-such-command").reload(Reload(tmp_path, "run-1"))
    assert (failing.tells_version, await failing.version()) == (False, None)


@pytest.mark.parametrize(
    "declared",
    [
        "POST reload",
        "  ",
        "POST /reload {broken",
        "PATCH /reload",
        'POST /reload {"path": "{directroy}"}',
        "reload {identiy}",
    ],
)
def test_what_cannot_be_read_is_told_at_the_start(declared: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expecting|did you mean"):
        DeclaredServer("", declared)


def test_braces_of_a_command_s_own_are_left_alone() -> None:
    declared = DeclaredServer("", "reload {directory}", "awk '{print}' /run/version")
    assert not declared.has_address
    assert DeclaredServer("http://127.0.0.1:8000", "reload", "GET /info version").has_address


async def test_an_engine_that_is_not_there_is_away() -> None:
    with pytest.raises(EngineAwayError):
        await Vllm("http://127.0.0.1:9").version()


class LeavingEngine(TinyEngine):
    """An engine that answers its first call, and nobody listens any more."""

    server: ThreadingHTTPServer

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.server.shutdown()
        self.server.socket.close()
        return super().answer(method, path, body)


@pytest.mark.parametrize("kind", [Vllm, Sglang, TransformersServe])
async def test_an_engine_that_goes_in_the_middle_of_a_reload_has_failed(
    kind: type[Vllm | Sglang | TransformersServe], weights: Path
) -> None:
    engine = LeavingEngine()
    engine.server = serve(engine)
    thread = threading.Thread(target=engine.server.serve_forever, args=[0.02])
    thread.start()
    reloaded = kind(f"http://127.0.0.1:{engine.server.server_address[1]}")
    with pytest.raises(EngineError) as failed:
        await reloaded.reload(Reload(weights, "run-1"))
    assert not isinstance(failed.value, EngineAwayError)
    with pytest.raises(EngineAwayError):  # one that was not there
        await reloaded.reload(Reload(weights, "run-1"))
    thread.join()


async def test_no_answer_fills_the_memory(engine: TinyEngine) -> None:
    engine.lies = "x" * (2 << 20)
    with pytest.raises(EngineError, match="GET /weight_info: more than 1048576 bytes"):
        await Vllm(engine.url).version()
    printed = f"{sys.executable} -c \"print('x' * (2 << 20) + 'tail')\""
    version = await DeclaredServer(engine.url, "true", printed).version()
    assert version is not None
    assert (len(version) <= 1 << 20, version[-4:]) == (True, "tail")


async def test_a_version_that_is_not_told_is_an_error(engine: TinyEngine) -> None:
    engine.refuses = {"/weight_info"}
    with pytest.raises(EngineError, match="GET /weight_info: 500"):
        await Vllm(engine.url).version()


async def test_an_answer_has_an_end_in_time_and_in_bytes() -> None:
    async with endless(b" ", 0.01) as url:
        with pytest.raises(EngineError, match=r"GET /health: no whole answer within 0\.5 s"):
            await call(url, "GET", "/health", timeout_seconds=0.5)
    async with endless(b" " * 65536, 0) as url:
        with pytest.raises(EngineError, match="more than 1048576 bytes"):
            await call(url, "GET", "/health")


async def test_a_declared_server_that_hangs_is_not_asked_for_as_long_as_a_load_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(declared, "CONTROL_SECONDS", 0.5)
    async with endless(b" ", 0.01) as url:
        with pytest.raises(EngineError, match=r"no whole answer within 0\.5 s"):
            await DeclaredServer(url, "true", "GET /info weight_version").version()
    with pytest.raises(EngineError, match="TimeoutError"):
        await DeclaredServer("", "true", "sleep 1000").version()
