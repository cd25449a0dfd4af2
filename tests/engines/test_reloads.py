"""What an agent sends to vLLM and SGLang, and reads: their own routes, no engine behind them."""

import ast
import asyncio
import importlib.util
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import uvicorn
from fastapi import FastAPI
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.rl.factories import register_rl_api_routers
from vllm.entrypoints.serve import register_vllm_dev_api_routers
from vllm.v1.engine import PauseMode

from agent.beside.engine_replica import UNNAMED
from agent.engines.reloading import EngineError, Reload
from agent.engines.sglang import Sglang
from agent.engines.vllm import Vllm
from tests.engines.sglang_server import http_server, io_struct
from tests.waiting import until

WEIGHTS = Path("/weights/current")
TRANSITIONS = ("ASYNC", "SYNC")
POLICIES = ("all", "new_session", "none")
RELOADS = [Reload(WEIGHTS, "run-1", one, other) for one in TRANSITIONS for other in POLICIES]


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve an application of theirs on a port of its own; yields its address."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical", ws="none")
    server = uvicorn.Server(config)
    work = asyncio.create_task(server.serve())

    async def has_started() -> bool:
        return server.started

    await until(has_started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await work


def parameters_of(module: str, kind: str, method: str) -> list[str]:
    """Parameters of a method, from the source of a module that imports only beside a GPU."""
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_text())
    (found,) = (
        item
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == kind
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name == method
    )
    return [argument.arg for argument in found.args.args]


# vLLM


class VllmEngine:
    """Takes the calls of vLLM's own interface, each held to its signature there."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.version = "default"
        self.fails: str | None = None
        self.is_flushed = True

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(EngineClient, name))

        async def answer(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(self, *arguments, **named)
            told = {key: value for key, value in bound.arguments.items() if key != "self"}
            self.calls.append((name, told))
            if name == self.fails:
                raise RuntimeError("an illegal memory access was encountered")
            if name == "update_weight_version":
                (self.version,) = told.values()
            answers = {"get_weight_version": self.version, "reset_prefix_cache": self.is_flushed}
            return answers.get(name, [None] if name == "collective_rpc" else None)

        return answer


@pytest.fixture
async def vllm() -> AsyncIterator[tuple[Vllm, VllmEngine]]:
    """An agent's way to vLLM's application, as `VLLM_SERVER_DEV_MODE=1` makes it."""
    app = FastAPI()
    register_vllm_dev_api_routers(app)
    register_rl_api_routers(app)
    app.state.engine_client = engine = VllmEngine()
    async with serving(app) as url:
        yield Vllm(url), engine


@pytest.mark.parametrize("reload", RELOADS, ids=str)
async def test_vllm_is_reloaded_by_its_own_routes(
    vllm: tuple[Vllm, VllmEngine], reload: Reload
) -> None:
    server, engine = vllm
    assert await server.version() in UNNAMED
    engine.calls.clear()
    await server.reload(reload)
    names = [name for name, _ in engine.calls]
    flush = ["reset_prefix_cache", "reset_encoder_cache"] if reload.flushes else []
    expected = ["pause_generation", "collective_rpc", "update_weight_version"]
    assert names == [*expected, *flush, "resume_generation"]
    told = dict(engine.calls)
    assert told["pause_generation"]["mode"] in get_args(PauseMode)
    assert told["pause_generation"]["mode"] == {"ASYNC": "keep", "SYNC": "wait"}[reload.transition]
    assert told["pause_generation"]["clear_cache"] is False  # the policy says what is dropped
    rpc = told["collective_rpc"]
    assert (rpc["method"], rpc["kwargs"]) == ("reload_weights", {"weights_path": str(WEIGHTS)})
    if flush:
        resets = {"reset_running_requests": True, "reset_connector": True}
        assert told["reset_prefix_cache"] == resets
    assert await server.version() == "run-1"


def test_vllms_workers_know_what_is_called() -> None:
    module = "vllm.v1.worker.gpu_model_runner"
    assert "weights_path" in parameters_of(module, "GPUModelRunner", "reload_weights")
    assert parameters_of("vllm.v1.worker.gpu_worker", "Worker", "reload_weights") == ["self"]


@pytest.mark.parametrize(
    ("fails", "path"),
    [
        ("pause_generation", "/pause"),
        ("collective_rpc", "/collective_rpc"),
        ("update_weight_version", "/update_weight_version"),
        ("reset_prefix_cache", "/reset_prefix_cache"),
        ("reset_encoder_cache", "/reset_encoder_cache"),
        ("resume_generation", "/resume"),
    ],
)
async def test_a_failure_of_vllm_is_one(
    vllm: tuple[Vllm, VllmEngine], fails: str, path: str
) -> None:
    server, engine = vllm
    engine.fails = fails
    with pytest.raises(EngineError, match=f"POST {path}: 500"):
        await server.reload(Reload(WEIGHTS, "run-1"))
    assert engine.calls[-1][0] == fails


async def test_a_cache_of_vllm_that_was_not_dropped_is_a_failure(
    vllm: tuple[Vllm, VllmEngine],
) -> None:
    server, engine = vllm
    engine.is_flushed = False
    with pytest.raises(EngineError, match="POST /reset_prefix_cache"):
        await server.reload(Reload(WEIGHTS, "run-1"))
    assert engine.calls[-1][0] == "reset_prefix_cache"


# SGLang


class SglangManager:
    """Takes what SGLang's routes hand to its tokenizer manager, as they have read it."""

    model_path = served_model_name = "m"
    is_generation = True
    model_config = SimpleNamespace(
        is_image_understandable_model=False, is_audio_understandable_model=False, hf_config=None
    )

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.version = "default"
        self.is_loaded = True

    def config_value(self, name: str) -> Any:
        return self.version if name == "weight_version" else None

    async def pause_generation(self, asked: Any) -> None:
        self.told.append(asked)

    async def continue_generation(self, asked: Any) -> None:
        self.told.append(asked)

    async def update_weights_from_disk(self, asked: Any, request: Any) -> tuple[bool, str, int]:
        self.told.append(asked)
        assert set(await request.json()) <= set(asked.__struct_fields__)  # others it would ignore
        if self.is_loaded:
            self.version = asked.weight_version
        return self.is_loaded, "" if self.is_loaded else "Failed to get weights iterator", 0


@pytest.fixture
async def sglang(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Sglang, SglangManager]]:
    """An agent's way to SGLang's own application."""
    manager = SglangManager()
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    settings = SimpleNamespace(tokenizer_path="m", preferred_sampling_params=None)
    monkeypatch.setattr(http_server, "get_serving", lambda: settings)
    async with serving(http_server.app) as url:
        yield Sglang(url), manager


@pytest.mark.parametrize("reload", RELOADS, ids=str)
async def test_sglang_is_reloaded_by_its_own_routes(
    sglang: tuple[Sglang, SglangManager], reload: Reload
) -> None:
    server, manager = sglang
    assert await server.version() in UNNAMED
    await server.reload(reload)
    update = io_struct.UpdateWeightFromDiskReqInput(
        model_path=str(WEIGHTS), weight_version="run-1", flush_cache=reload.flushes
    )
    expected: list[Any] = [update]
    if reload.transition == "ASYNC":
        mode = "retract" if reload.flushes else "in_place"
        pause = io_struct.PauseGenerationReqInput(mode=mode)
        expected = [pause, update, io_struct.ContinueGenerationReqInput()]
    assert [type(one) for one in manager.told] == [type(one) for one in expected]
    for told, one in zip(manager.told, expected, strict=True):
        fields = set(one.__struct_fields__) - {"rid", "http_worker_ipc"}
        assert {name: getattr(told, name) for name in fields} == {
            name: getattr(one, name) for name in fields
        }
    assert await server.version() == "run-1"


async def test_an_update_that_sglang_refused_is_a_failure(
    sglang: tuple[Sglang, SglangManager],
) -> None:
    server, manager = sglang
    manager.is_loaded = False
    with pytest.raises(EngineError, match=r"400: .*weights iterator"):
        await server.reload(Reload(WEIGHTS, "run-1"))
    assert [type(one) for one in manager.told][-1] is io_struct.UpdateWeightFromDiskReqInput
    assert await server.version() == "default"
