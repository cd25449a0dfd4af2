"""A trainer that only writes: every checkpoint that appears gets its cycle."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.watch import publish_new_versions
from hotload.identity import version_of
from hotload.spec import WatchSpec
from tests.flows.fleet import Fleet
from tests.signals import signals_are_heard
from tests.waiting import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(600),
    # Prefect leaves its own connections to its API to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def written(fleet: Fleet, version: int, name: str = "") -> Path:
    """A checkpoint as a trainer saves it: under another name until it is whole."""
    target = fleet.root / "saved" / (name or f"checkpoint-{version}")
    partial = target.with_name("saving")
    shutil.copytree(fleet.checkpoints[version], partial)
    return partial.rename(target)


def watched(fleet: Fleet, **changes: object) -> WatchSpec:
    cycle = fleet.declared(1, checkpoint=str(fleet.root / "saved" / "checkpoint-1"))
    return WatchSpec.model_validate({"cycle": cycle, "still_seconds": 0, **changes})


async def test_each_version_that_appears_gets_its_cycle_once(fleet: Fleet) -> None:
    for version in (1, 2):
        written(fleet, version)
    torn = written(fleet, 3)
    shard = sorted(torn.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    first = await publish_new_versions(watched(fleet))
    assert [line.split(":")[0] for line in first] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert first[0].endswith(": Completed")
    assert first[1].endswith(": Completed")
    assert f"waits for {shard.name}" in first[2]
    shard.write_bytes(whole)
    assert await publish_new_versions(watched(fleet)) == ["checkpoint-3: Completed"]
    assert await publish_new_versions(watched(fleet)) == []
    kinds = [report.snapshot.kind.value for report in fleet.reports()]
    assert kinds == ["full", "delta", "delta"]


async def test_a_version_that_fails_is_told_and_the_next_one_follows(fleet: Fleet) -> None:
    (written(fleet, 1) / "config.json").write_text("{")
    written(fleet, 2)
    lines = await publish_new_versions(watched(fleet))
    assert lines[0].startswith("checkpoint-1: Failed: ")
    assert "config.json" in lines[0]
    assert lines[1] == "checkpoint-2: Completed"
    assert await publish_new_versions(watched(fleet)) == []  # overtaken


async def test_a_pattern_that_no_name_fits_is_told(fleet: Fleet) -> None:
    written(fleet, 1)
    (line,) = await publish_new_versions(watched(fleet, name=r"step_(?P<version>\d+)"))
    assert line.startswith("no version among 1 name ('checkpoint-1'): expected step_")


async def test_the_newest_may_be_enough(fleet: Fleet) -> None:
    for version in (1, 2, 3):
        written(fleet, version)
    assert await publish_new_versions(watched(fleet, newest_only=True)) == [
        "checkpoint-3: Completed"
    ]


@signals_are_heard()
def test_a_watcher_publishes_what_a_trainer_writes_until_it_is_stopped(fleet: Fleet) -> None:
    (fleet.root / "saved").mkdir()
    cycle = fleet.declared(1, checkpoint=str(fleet.root / "saved" / "000001"))
    file = fleet.root / "cycle.yaml"
    file.write_text(yaml.safe_dump({"cycle": cycle}))
    command = [sys.executable, "-m", "flows.watch", str(file), "--every", "0.05"]
    watcher = subprocess.Popen(
        [*command, "--marker", "STABLE"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with watcher:
        assert watcher.stdout is not None
        lines = [next(watcher.stdout)]
        for version in (1, 2):
            directory = written(fleet, version, f"{version:06d}")
            lines.append(next(watcher.stdout))
            (directory / "STABLE").touch()

            def is_served(version: int = version) -> bool:
                (identity, *others) = fleet.served()
                return not others and identity is not None and version_of(identity) == version

            wait_until(is_served)
            lines.append(next(watcher.stdout))
        watcher.send_signal(signal.SIGINT)
        watcher.communicate(timeout=PATIENCE_SECONDS)
    assert watcher.returncode == 130
    assert [line.rstrip() for line in lines] == [
        f"watching {fleet.root / 'saved'} for run run",
        *(f"{n:06d}: {what}" for n in (1, 2) for what in ("waits for STABLE", "Completed")),
    ]
