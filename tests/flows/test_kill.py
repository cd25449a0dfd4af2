"""Cycles killed with SIGKILL, at random moments and at chosen ones, and started again (rule 9).

Four random kills; ten in `make long`, and the chosen ones. HOTLOAD_KILLS=100 for more,
HOTLOAD_KILL_SEED for other moments.
"""

import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from examples.tiny_trainer import TinyTrainer
from hotload.dataset.rollout_plan import RolloutManifest
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import SnapshotManifest
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import CycleProcess, Standing
from tests.flows.store_reader import StoreReader
from tests.waiting import PATIENCE_SECONDS

KILLS = int(os.environ.get("HOTLOAD_KILLS", "4"))
SEED = int(os.environ.get("HOTLOAD_KILL_SEED", "7"))
REPLICAS = 3
PROBLEMS, COMPLETIONS = 4, 2
FULL_EVERY = 2  # in the random series, so that fulls and deltas are struck alike
# Loads take a moment, so that kills strike while replicas are at different states.
SECONDS_PER_STATE = 0.05
Moment = Callable[[CycleProcess], bool]
Kill = tuple[str, list[dict[str, Any]], Moment]  # in words, under which faults, when

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Series:
    """Policy versions of one run, each published by processes that may be killed on the way."""

    def __init__(self, fleet: Fleet, trainer: TinyTrainer) -> None:
        self.fleet = fleet
        self.version = 0
        self.full_every = 20
        self.may_fail = False  # whether a replica was told to fail a load
        self.standing: list[Standing] = []
        self.process: CycleProcess | None = None
        self._trainer = trainer
        self._faults: list[dict[str, Any]] = []
        self.next_version()

    @property
    def spec(self) -> CycleSpec:
        """The cycle of this version."""
        return self.fleet.spec(
            self.version,
            sampling={
                "completions_per_prompt": COMPLETIONS,
                "max_completion_tokens": 4,
                "problems_per_task": 1,
            },
            cadence={"full_every": self.full_every},
        )

    @property
    def has_ended(self) -> bool:
        """Whether this version's report lies in the store."""
        return (self.records / f"reports/{self.spec.name}.json").exists()

    @property
    def records(self) -> Path:
        """Where the store keeps hotload's own records."""
        return self.fleet.bucket / "_hotload"

    def next_version(self) -> None:
        """The trainer writes another checkpoint."""
        self.version += 1
        self.standing.clear()
        path = self.fleet.checkpoints[0].with_name(f"{self.version:06d}")
        self._trainer.step()
        self._trainer.save(path)
        self.fleet.checkpoints.append(path)

    def order(self, faults: list[dict[str, Any]]) -> None:
        """Let the service have these faults only; the same ones as before go on as they are."""
        if faults != self._faults:
            httpx.delete(
                f"{self.fleet.url}/emulator/faults", timeout=PATIENCE_SECONDS
            ).raise_for_status()
            for fault in faults:
                self.fleet.fault(**fault)
        self._faults = faults

    def start(self) -> CycleProcess:
        """Start this version's cycle, for the first time or again."""
        self.process = CycleProcess(self.fleet, self.spec)
        return self.process

    def kill(self) -> str:
        """Kill it now; where it was. What stands from now on must not be done again."""
        assert self.process is not None
        where = self.process.kill()
        self.standing.append(Standing.of(self.fleet, self.spec))
        damaged = self.standing[-1].damaged
        return where + (f"; {len(damaged)} results half written" if damaged else "")

    def check(self) -> CycleReport:
        """The report of this version, which has ended, once everything it says is seen to hold."""
        name = self.spec.name
        report = CycleReport.model_validate_json(
            (self.records / f"reports/{name}.json").read_text()
        )
        served = report.snapshot.identity
        assert self.fleet.served() == {served}
        self._check_replicas(served)
        self._check_attempts(served)
        self._check_groups(served)
        for standing in self.standing:
            assert not standing.changed(served), "was done again although its result existed"
        return report

    def _check_replicas(self, served: str) -> None:
        checkpoint = self.fleet.checkpoints[self.version]
        held = list((self.fleet.root / "replicas").glob(f"*/*/held/{served}"))
        assert len(held) == REPLICAS
        for directory in held:
            for file in checkpoint.iterdir():
                assert (directory / file.name).read_bytes() == file.read_bytes(), file.name
        log = self.fleet.log()
        assert log["client_bugs"] == []
        for replica, loads in log["snapshots"].items():
            twice = [one for one, n in Counter(load["identity"] for load in loads).items() if n > 1]
            assert not twice, f"{replica} was made to load {twice} twice"
            for before, load in pairwise(loads):
                assert before["result"] == "applied" or load["kind"] == "full", (replica, loads)

    def _check_attempts(self, served: str) -> None:
        """One identity; another only after a delta that failed, or whose signal was in doubt."""
        log = self.fleet.log()
        signalled = {note["identity"] for note in log["signals"]}
        loads = [load for loads in log["snapshots"].values() for load in loads]
        failed = {load["identity"] for load in loads if load["result"] != "applied"}
        assert not failed or self.may_fail
        for path in (self.records / "snapshots").glob(f"{self.spec.name}-*.json"):
            manifest = SnapshotManifest.parse(path.read_bytes(), identity=path.stem)
            if manifest.identity == served:
                continue
            assert manifest.kind is SnapshotKind.DELTA
            assert (self.records / "signals/local/rollouts" / path.name).exists()
            assert manifest.identity in failed or manifest.identity not in signalled
            why = "failed" if manifest.identity in failed else "was killed between mark and signal"
            print(f"  {manifest.identity} {why}, so {served} was full")

    def _check_groups(self, served: str) -> None:
        directory = self.records / "rollouts" / served
        manifest = RolloutManifest.parse(
            (directory / "manifest.json").read_bytes(), path="manifest"
        )
        assert {part.file for part in manifest.parts} == {p.name for p in directory.glob("part-*")}
        samples = pl.concat([pl.read_parquet(directory / part.file) for part in manifest.parts])
        assert samples.select("problem_id", "sample_number").n_unique() == samples.height
        assert samples.height == PROBLEMS * COMPLETIONS
        assert samples["failure"].is_null().all()
        assert set(samples["identity"]) == {served}


@pytest.fixture
async def series(prefect_api: str, tmp_path: Path) -> AsyncIterator[Series]:
    """A series before its first version, on replicas that take a moment for every state."""
    name = f"killed-{uuid.uuid4().hex[:12]}"
    settings: dict[str, Any] = {
        "replica_count": REPLICAS,
        "seconds_per_state": SECONDS_PER_STATE,
        "work_dir": tmp_path / "replicas",
    }
    base, trainer = tmp_path / "checkpoints" / "000000", TinyTrainer()
    trainer.save(base)
    with running_fleet(name, tmp_path, [base], **settings) as fleet:
        await save_blocks(fleet)
        started = Series(fleet, trainer)
        try:
            yield started
        finally:
            if started.process is not None:
                started.process.stop()


@pytest.mark.timeout(400 + 30 * KILLS)
async def test_killed_at_random_moments(series: Series) -> None:
    rng = random.Random(SEED)
    series.full_every = FULL_EVERY
    with StoreReader(series.fleet.bucket, series.fleet.checkpoints) as reader:
        lives = []
        for _ in range(2):  # a full and a delta, undisturbed: how long is a life?
            lives.append(series.start().finish())
            series.check()
            series.next_version()
        print(f"\nundisturbed: full {lives[0]:.2f} s, delta {lives[1]:.2f} s after the flow began")
        # One moment from every n-th of a life, in random order.
        moments = [max(lives) * (n + rng.random()) / KILLS for n in range(KILLS)]
        rng.shuffle(moments)
        while moments:
            process = series.start()
            if not process.ends_within(moments[-1]):
                at, number = moments.pop(), KILLS - len(moments)
                print(f"  kill {number}, version {series.version}, {at:.2f} s: {series.kill()}")
                if not series.has_ended:
                    continue
                process = series.start()
            elif not series.standing:
                moments[-1] *= rng.random()  # lives have become shorter
            process.finish()
            print_end(series.check())
            series.next_version()
        series.start().finish()
        print_end(series.check())
    assert reader.complaints == []
    print(f"a reader looked {reader.looks} times")


@pytest.mark.heavy
@pytest.mark.timeout(600)
async def test_killed_at_chosen_moments(series: Series) -> None:
    """What a random moment hardly hits: half-done steps, and the instants around the signal."""
    fleet, bucket = series.fleet, series.fleet.bucket
    work = fleet.root / "work" / "local" / "rollouts"

    def appears(where: Path, pattern: str) -> Moment:
        return lambda _: any(where.glob(pattern.format(name=series.spec.name)))

    def appears_twice(where: Path, pattern: str) -> Moment:
        def is_there(_: CycleProcess) -> bool:
            found = where.glob(pattern.format(name=series.spec.name))
            return len({path.parent for path in found}) > 1

        return is_there

    def is_accepted(_: CycleProcess) -> bool:
        signals = fleet.log()["signals"]
        return any(note["identity"].startswith(series.spec.name) for note in signals)

    no_answer = {"fault": "hang", "operation": "signal"}
    lost_answer = {"fault": "respond", "operation": "signal", "status": 503, "accepted": True}
    lagging = {"fault": "lagging_replica", "replica": "replica-1"}
    torn = {"fault": "torn_apply", "replica": "replica-1", "count": 1}
    loading = [lost_answer, lagging]
    record, marks = "_hotload/{}/{{name}}", "_hotload/signals/local/rollouts"
    a_delta: list[Kill] = [
        ("a delta is encoded", [], appears(work, "deltas/{name}-*/*.safetensors")),
        ("a shard is stored", [], appears(bucket, "{name}-*/*.safetensors")),
        ("all but our manifest is stored", [], appears(bucket, "{name}-*/*.index.json")),
        ("the signal is accepted, its answer lost", loading, is_accepted),
        ("a replica has not loaded", loading, lambda process: process.has_said("waiting: ")),
        ("the baseline moves on", [], appears(work, "baseline/{name}-*")),
        ("a part is stored", [], appears(bucket, record.format("rollouts") + "-*/part-*")),
        ("all but the report is stored", [], appears(bucket, record.format("rollouts") + "-*/m*")),
        ("the lease is not given back", [], appears(bucket, record.format("reports") + "*")),
    ]
    unheard: list[Kill] = [
        ("the signal never arrives", [no_answer], appears(bucket, f"{marks}/{{name}}*"))
    ]
    fallback: list[Kill] = [
        ("the fallback begins", [torn], lambda process: process.has_said("'full-for-")),
        ("its first shards are stored", [], appears_twice(bucket, "{name}-*/*.safetensors")),
    ]
    kills = missed = 0
    with StoreReader(bucket, fleet.checkpoints) as reader:
        series.start().finish()
        print()
        print_end(series.check())
        for story in (a_delta, unheard, fallback):
            series.next_version()
            series.may_fail = story is fallback
            for what, faults, moment in story:
                series.order(faults)
                process = series.start()
                if process.reaches(moment):
                    kills += 1
                    print(f"  killed when {what}: {series.kill()}")
                else:  # the kill before struck later than it was aimed at
                    process.finish()
                    missed += 1
                    print(f"  missed when {what}")
            series.order([])
            series.start().finish()
            report = series.check()
            print_end(report)
            assert story is a_delta or report.snapshot.kind is SnapshotKind.FULL
    assert reader.complaints == []
    assert missed <= kills // 4


def print_end(report: CycleReport) -> None:
    print(f"{report.snapshot.identity}: {report.snapshot.kind.value}, {report.outcome}")
