"""An asynchronous run killed with SIGKILL at every arrow of a step: every usable group is trained
once, and no version has two contents. `make train-kills` runs it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from hotload.clients.handoff.directory import find_rollouts, read_groups
from hotload.clients.handoff.usable_groups import is_usable
from hotload.clients.store import Store
from hotload.identity import NamedVersion
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.training_runs import DIES, Kill, declared, read_run, run_killed, with_problems

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROBLEMS = 10
KILLS: list[Kill] = [
    ("'roll-out-0'", {}),
    ("", {DIES: "backward 0"}),
    ("", {DIES: "backward! 1"}),
    ("", {DIES: "save_state! 0"}),
    ("", {DIES: "export 1"}),
    ("", {DIES: "export! 1"}),
    ("'record-", {}),
    ("'acknowledge-", {}),
    ("'manifests-learn-", {}),
    ("'signal-learn-", {}),
    ("'published-learn-", {}),
    ("", {DIES: "step! 1"}),
    ("'record-", {}),
    ("'publish-learn-", {}),
]


async def usable_groups(fleet: Fleet, versions: int) -> set[tuple[int, str]]:
    """Version and problem of every group in the store that teaches something."""
    store, found = Store(fleet.bucket.as_uri()), set()
    for version in range(versions):
        for stored in (await find_rollouts(store, NamedVersion("learn", 0, version)))[:1]:
            assert stored.manifest.is_complete
            for part in stored.manifest.parts:
                groups = await read_groups(store, stored.directory, part)
                # Nothing is thrown away for its age.
                assert not any((rows["failure"] == "stale").any() for rows in groups.values())
                found |= {(version, name) for name, rows in groups.items() if is_usable(rows)}
    return found


@pytest.mark.parametrize("kills", [KILLS[0::2], KILLS[1::2]], ids=["even", "odd"])
async def test_killed_at_every_arrow(
    prefect_api: str,
    tmp_path: Path,
    checkpoints: list[Path],
    kills: list[Kill],
) -> None:
    with running_fleet(
        f"a{uuid.uuid4().hex[:12]}", tmp_path, checkpoints, seconds_per_token=0.1
    ) as fleet:
        await save_blocks(fleet)
        with_problems(fleet, PROBLEMS)
        document = declared(
            fleet,
            windows={"prompt_groups_per_step": 2, "epochs": 2, "seed": 3},
            pipeline_chunks_per_step=2,
            dcp_save_interval=2,
        )
        count, log = run_killed("flows.async_rl_loop", fleet, document, kills)
        records = await read_run(fleet)
        trained = [
            (part.sampled_version, problem)
            for record in records
            for part in record.groups
            for problem in part.problem_ids
        ]
        assert len(trained) == len({*trained})
        assert {*trained} == await usable_groups(fleet, len(records) + 1)
        # A step that was made again came to the bits that were recorded.
        assert not [line for line in log if "is spent" in line]
        signals = [note["identity"] for note in fleet.log()["signals"]]
        versions = [identity.rpartition("-")[0] for identity in signals]
        assert len({*versions}) == len({*signals})
        assert versions == sorted(versions)
        assert fleet.log()["client_bugs"] == []
    assert count >= len(kills) - 2
