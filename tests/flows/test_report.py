"""What a cycle leaves to look at: a page, metrics, artifacts; and its groups, read back."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter

from flows.cycle import checkpoint_to_rollout
from hotload.clients.handoff.reader import RolloutReader
from hotload.clients.store import Store
from hotload.dataset.trainer_batch import make_batch
from hotload.identity import SnapshotKind
from hotload.publish.publication import Publication
from hotload.publish.snapshot import CheckpointContent
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tasks.conclude import conclude_cycle
from tasks.show import emit_waiting
from tests.flows.fleet import Fleet

pytestmark = [
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
    at_the_end = f"2 replicas: on {report.snapshot.identity}, ready"
    assert report.snapshot.by_replica == (at_the_end,)
    assert f"At the end: {at_the_end}." in page
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

    store = Store(url=fleet.bucket.as_uri())
    async with RolloutReader(store, "run", 1, consumer="trainer", groups_per_batch=3) as reader:
        deliveries = [delivery async for delivery in reader]
        assert sorted(name for each in deliveries for name in each.problem_ids) == [
            "sum-0", "sum-1", "sum-2", "sum-3",
        ]  # fmt: skip
        assert sum(len(make_batch(each.frame)) for each in deliveries) == 8


async def test_a_run_has_one_artifact_with_a_version_for_every_cycle(fleet: Fleet) -> None:
    for version in (1, 2, 3):
        await checkpoint_to_rollout(fleet.spec(version, run_id=fleet.name))
    key = ArtifactFilter(key=ArtifactFilterKey(any_=[f"hotload-{fleet.name}"]))
    async with get_client() as client:
        found = await client.read_artifacts(artifact_filter=key)
    assert [each.type for each in found] == ["markdown"] * 3
    shown = max((str(each.data) for each in found), key=len)
    first, second, third = (line for line in shown.splitlines() if re.match(r"\| [123] ", line))
    assert first.startswith("| 1 | full ")
    assert f"delta {fleet.name}-000003-" in third
    assert second.split()[4] in third  # the delta follows it
    assert "| mean reward |" in shown
    assert "](" not in shown


async def test_events_say_what_is_served_and_how_a_cycle_ended(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(1, run_id=fleet.name))
    async with get_events_subscriber(EventFilter(event=EventNameFilter(prefix=["hotload."]))) as on:
        emit_waiting(f"{fleet.name}-000002.1", "a replica")
        fleet.fault(fault="torn_apply", replica="replica-1", count=1)
        report = await checkpoint_to_rollout(fleet.spec(2, run_id=fleet.name, line=1))
        events = {}
        async for event in on:
            if event.resource.id == f"hotload.run.{fleet.name}":
                events[event.event] = event.payload
                if event.payload.get("outcome") == "fell back":
                    break
    waiting = {"policy_version": 2, "line": 1, "detail": "a replica"}
    assert events.pop("hotload.cycle.waiting") == waiting
    assert {(each["policy_version"], each["line"]) for each in events.values()} == {(2, 1)}
    assert report.snapshot.identity.startswith(f"{fleet.name}-000002.1-")
    assert events["hotload.cycle.fell-back"]["reason"] == report.fallback_reason
    assert events["hotload.snapshot.served"]["identity"] == report.snapshot.identity
    assert events["hotload.cycle.ended"]["parts_uri"] == report.rollouts.parts_uri


@dataclass(frozen=True, eq=False)
class CountingStore(Store):
    """A store that notes which files were read."""

    read: list[str] = field(default_factory=list)

    async def read_bytes(self, path: str, *, limit_bytes: int) -> bytes:
        self.read.append(path)
        return await super().read_bytes(path, limit_bytes=limit_bytes)


async def test_a_report_reads_no_part(fleet: Fleet) -> None:
    """All figures are in the manifest: it is the same report though the parts are gone."""
    spec = fleet.spec(1)
    report = await checkpoint_to_rollout(spec)
    metrics = fleet.bucket / "_hotload/metrics/run-000001.jsonl"
    page = fleet.bucket / "_hotload/reports/run-000001.html"
    written = without_moments(metrics)
    store = CountingStore(url=fleet.bucket.as_uri())
    await conclude(store, spec, report)
    assert [path for path in store.read if path.endswith(".parquet")] == []
    assert any(path.endswith("manifest.json") for path in store.read)
    for part in (fleet.bucket / "_hotload/rollouts").rglob("*.parquet"):
        part.unlink()
    await conclude(store, spec, report)
    assert without_moments(metrics) == written
    assert "Not known" not in page.read_text()


async def test_without_a_manifest_the_report_says_that_samples_are_not_known(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    spec = fleet.spec(1)
    report = await checkpoint_to_rollout(spec)
    for manifest in (fleet.bucket / "_hotload/rollouts").rglob("manifest.json"):
        manifest.unlink()
    with caplog.at_level(logging.WARNING):
        await conclude(Store(url=fleet.bucket.as_uri()), spec, report)
    assert "the report is without statistics of the samples" in caplog.text
    page = (fleet.bucket / "_hotload/reports/run-000001.html").read_text()
    assert "Not known" in page
    lines = (fleet.bucket / "_hotload/metrics/run-000001.jsonl").read_text().splitlines()
    assert "rollout/raw_samples" in lines[-1]
    assert "rollout/filtered_samples" not in lines[-1]


async def conclude(store: Store, spec: CycleSpec, report: CycleReport) -> None:
    """Conclude a cycle once more, in a flow of its own."""

    content = CheckpointContent(kind=SnapshotKind.FULL, shards=(), side_files=())
    snapshot, fallback = report.snapshot, report.fallback_reason
    publication = Publication(content=content, snapshot=snapshot, fallback=fallback)

    @flow
    async def concluding() -> None:
        began = monotonic() - report.seconds
        await conclude_cycle(store, spec, publication, report.rollouts, None, began)

    await concluding()


def without_moments(metrics: Path) -> dict[str, float]:
    """The cycle's own numbers without those that depend on when the report was made."""
    numbers = json.loads(metrics.read_text().splitlines()[-1])
    return {name: value for name, value in numbers.items() if not name.endswith(("at", "_time"))}


async def test_what_only_informs_fails_no_cycle(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await checkpoint_to_rollout(fleet.spec(1))
    (fleet.bucket / "_hotload/reports/run-000001.json").unlink()  # as if killed just before
    # Found to be not installed, whether it is or not.
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = fleet.spec(1, prometheus_file="/nowhere/hotload.prom", wandb={"entity": "acme"})
    with caplog.at_level(logging.WARNING):
        again = await checkpoint_to_rollout(spec)
    assert again.rollouts == first.rollouts
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
    store = Store(url=fleet.bucket.as_uri())
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
