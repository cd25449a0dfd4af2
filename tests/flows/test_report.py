"""What a cycle leaves to look at: a page, metrics, artifacts; and its groups, read back."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from blocks.checkpoint_store import CheckpointStore
from flows.cycle import checkpoint_to_rollout
from hotload.clients.handoff.reader import RolloutReader
from hotload.dataset.trainer_batch import make_batch
from tests.flows.fleet import Fleet

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


async def test_a_cycle_leaves_a_page_metrics_and_groups(fleet: Fleet) -> None:
    gauges = fleet.root / "hotload.prom"
    spec = fleet.spec(1, prometheus_file=str(gauges))
    report = await checkpoint_to_rollout(spec)

    page = (fleet.bucket / "_hotload/reports/run-000001.html").read_text()
    assert "version 1" in page
    assert "8 samples" in page
    assert report.snapshot.identity in page
    assert [count for _, count in report.snapshot.convergence][-1] == 2
    for heading in ("Where the time went", "roll out and score", "Requests in flight", "Rewards"):
        assert heading in page

    run_page = (fleet.bucket / "_hotload/runs/run.html").read_text()
    assert f"<td>{report.snapshot.identity}</td>" in run_page
    assert run_page.count('<span class="chip">served</span>') == 1

    metrics = (fleet.bucket / "_hotload/metrics/run-000001.jsonl").read_text().splitlines()
    last = json.loads(metrics[-1])
    assert last["perf/step_time"] == report.seconds
    assert last["rollout/raw_samples"] == 8
    assert last["identity"] == report.snapshot.identity
    assert f'hotload_perf_step_time{{run="run"}} {report.seconds!r}\n' in gauges.read_text()

    store = CheckpointStore(url=fleet.bucket.as_uri())
    async with RolloutReader(store, "run", 1, consumer="trainer", groups_per_batch=3) as reader:
        deliveries = [delivery async for delivery in reader]
        assert sorted(name for each in deliveries for name in each.problem_ids) == [
            "sum-0", "sum-1", "sum-2", "sum-3",
        ]  # fmt: skip
        assert sum(len(make_batch(each.frame)) for each in deliveries) == 8

    key = ArtifactFilter(key=ArtifactFilterKey(any_=["cycle-run-000001-page"]))
    async with get_client() as client:
        found = await client.read_artifacts(artifact_filter=key)
    assert any(f"{fleet.bucket.as_uri()}/_hotload/reports/run-000001.html" in str(each.data)
               for each in found)  # fmt: skip


async def test_what_only_informs_fails_no_cycle(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await checkpoint_to_rollout(fleet.spec(1))
    (part, *_) = (fleet.bucket / "_hotload/rollouts").rglob("*.parquet")
    part.write_bytes(b"x" * part.stat().st_size)
    (fleet.bucket / "_hotload/reports/run-000001.json").unlink()  # as if killed just before
    # Found to be not installed, whether it is or not.
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = fleet.spec(1, prometheus_file="/nowhere/hotload.prom", wandb={"entity": "acme"})
    with caplog.at_level(logging.WARNING):
        again = await checkpoint_to_rollout(spec)
    assert again.rollouts == first.rollouts
    assert "the page shows only some of the samples" in caplog.text
    assert "the Prometheus file was not written" in caplog.text
    assert "the package wandb is not installed" in caplog.text
    assert fleet.reports() == [again]
    assert (fleet.bucket / "_hotload/runs/run.html").read_text().count('class="served"') == 1


async def test_a_report_tells_what_the_trainer_told_of_the_version_before(fleet: Fleet) -> None:
    def metrics(version: int) -> dict[str, float]:
        lines = fleet.bucket / f"_hotload/metrics/run-{version:06d}.jsonl"
        return json.loads(lines.read_text().splitlines()[-1])

    await checkpoint_to_rollout(fleet.spec(1))
    assert not [name for name in metrics(1) if "train" in name and "trainable" not in name]
    store = CheckpointStore(url=fleet.bucket.as_uri())
    async with RolloutReader(store, "run", 1, consumer="trainer") as reader:
        async for delivery in reader:
            batch = make_batch(delivery.frame)
            logprobs = batch.by_frame_row(batch.sampling_logprobs - 0.25)
            await reader.acknowledge(delivery, logprobs)
    await checkpoint_to_rollout(fleet.spec(2))
    assert metrics(2)["async/trained_against_version"] == 1
    run_page = (fleet.bucket / "_hotload/runs/run.html").read_text()
    assert run_page.count('class="served"') == 2
    assert "Trainer against sampler" in run_page
    assert metrics(2)["rollout/trainer_drift_k1"] == pytest.approx(0.25)
    page = (fleet.bucket / "_hotload/reports/run-000002.html").read_text()
    assert "samples of version 1" in page

    # A log that cannot be read costs the report its drift, and nothing else.
    for log in (fleet.bucket / "_hotload/rollouts").rglob("claims/*/000000.json"):
        log.write_text('{"kind": "lease"}')
    (fleet.bucket / "_hotload/reports/run-000002.json").unlink()
    again = await checkpoint_to_rollout(fleet.spec(2))
    assert "async/trained_against_version" not in metrics(2)
    assert again in fleet.reports()


async def test_weights_and_biases_gets_the_metrics(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report = await checkpoint_to_rollout(fleet.spec(1, wandb={"entity": "acme"}))
    assert report.rollouts.sample_count == 8
    (run,) = (tmp_path / "wandb").glob("offline-run-*-run/run-run.wandb")
    assert b"perf/step_time" in run.read_bytes()
