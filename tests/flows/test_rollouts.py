"""The rollout flow under a real Prefect server: handed back, found again, stopped when refused."""

import json
from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from flows.sampling import roll_out
from hotload.clients.store import Store
from hotload.dataset.table import check_rollouts
from hotload.errors import ServiceRefusedError
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.rollout import SampledService
from hotload.spec import CycleSpec
from tests.blocks.scripted_inference import GOOD, IDENTITY, client
from tests.factories import cycle_spec
from tests.scripted_server import ScriptedServer, http

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    # Prefect leaves its own connections to its API to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def spec_in(directory: Path, *, is_warm: bool = False) -> CycleSpec:
    dataset = directory / "problems.jsonl"
    rows = ({"id": i, "prompt": f"problem {i}", "answer": "ab"} for i in range(5))
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cycle_spec(
        work_dir=str(directory),
        problems={"dataset": str(dataset)},
        sampling={"completions_per_prompt": 2, "problems_per_task": 2},
        readiness={"warmup_after_hotload": not is_warm},
    )


def store_in(directory: Path) -> str:
    (directory / "store").mkdir()
    return (directory / "store").as_uri()


@flow
async def rolled_out(spec: CycleSpec, url: str, *ports: int) -> RolloutSummary:
    sources = [SampledService(client(port), IDENTITY, 3) for port in ports]
    return await roll_out(spec, sources, Store(url=url))


async def test_rolled_out_once_and_then_found(tmp_path: Path) -> None:
    async with ScriptedServer(
        http(b"{}", content_type="application/json"), http(GOOD)
    ).running() as script:
        url = store_in(tmp_path)
        summary = await rolled_out(spec_in(tmp_path), url, script.port)
        assert len(script.requests) == 1 + 10  # the warm-up goes first
        assert await rolled_out(spec_in(tmp_path), url, script.port) == summary
        assert len(script.requests) == 1 + 10
    assert (summary.group_count, summary.sample_count, summary.mean_reward) == (5, 10, 1.0)
    directory = summary.parts_uri.removeprefix("file://")
    frame = check_rollouts(pl.read_parquet(f"{directory}/*.parquet"))
    assert frame.height == 10


async def test_rolled_out_in_processes(tmp_path: Path) -> None:
    spec, url = spec_in(tmp_path, is_warm=True), store_in(tmp_path)
    sampling = spec.sampling.model_copy(update={"processes": 2})
    async with ScriptedServer(http(GOOD)).running() as script:
        several = spec.model_copy(update={"sampling": sampling})
        summary = await rolled_out(several, url, script.port)
        # One process finds what several have left.
        assert await rolled_out(spec, url, script.port) == summary
        assert len(script.requests) == 10
    assert (summary.group_count, summary.sample_count, summary.mean_reward) == (5, 10, 1.0)


async def test_two_services_share_the_processes(tmp_path: Path) -> None:
    spec, url = spec_in(tmp_path, is_warm=True), store_in(tmp_path)
    sampling = spec.sampling.model_copy(update={"processes": 2})
    spec = spec.model_copy(update={"sampling": sampling})
    async with (
        ScriptedServer(http(GOOD)).running() as one,
        ScriptedServer(http(GOOD)).running() as other,
    ):
        summary = await rolled_out(spec, url, one.port, other.port)
    assert summary.sample_count == len(one.requests) + len(other.requests) == 10
    assert one.requests
    assert other.requests


async def test_a_refused_key_stops_the_flow(tmp_path: Path) -> None:
    async with ScriptedServer(http(b"", 401)).running() as script:
        url = store_in(tmp_path)
        with pytest.raises(ServiceRefusedError):
            await rolled_out(spec_in(tmp_path, is_warm=True), url, script.port)
    assert not (tmp_path / "store" / "_hotload").exists()
