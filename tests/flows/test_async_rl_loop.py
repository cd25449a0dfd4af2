"""The asynchronous loop on a real Prefect server: cycles publish while others sample, and a trainer
takes the groups of all of them."""

from __future__ import annotations

from collections import Counter

import pytest

from flows.async_rl_loop import async_rl_loop
from tests.flows.fleet import Fleet
from tests.flows.training_runs import ahead_of, problems_of, read_run, with_problems

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


async def test_a_run_is_sampled_ahead_of_its_trainer(fleet: Fleet) -> None:
    """Six problems, two groups a step in two chunks, the sampler one version ahead."""
    with_problems(fleet, 6)
    spec = ahead_of(
        fleet,
        windows={"prompt_groups_per_step": 2, "seed": 3},
        pipeline_chunks_per_step=2,
        output_model_id="result",
    )
    last = await async_rl_loop(spec)
    records = await read_run(fleet)
    assert last is not None
    assert records[-1] == last
    # Both steps of the first window are from version 0; the second is trained one version on.
    assert records[0].open_windows[0].count == 4
    assert max(one.figures["async/version_offset_max"] for one in records) == 1
    exported = [one.checkpoint.policy_version for one in records if one.checkpoint is not None]
    assert exported == [*range(1, len(records) + 1)]
    # Publications are in order, each once; those of the end are left out but for the last.
    published = [note["identity"].split("-")[1] for note in fleet.log()["signals"]]
    assert published == sorted({*published})
    assert published[-1] == f"{exported[-1]:06d}"
    # A reward of all samples of each step's windows, and a page.
    assert all(0 <= one.figures["rollout/raw_reward"] <= 1 for one in records)
    assert records[0].figures["rollout/raw_samples"] >= 4
    assert all(one.figures["perf/save_time"] > 0 for one in records)
    page = fleet.bucket / f"_hotload/training/{last.run_id}/page.html"
    assert f"After step <b>{last.step}</b>" in page.read_text()
    # No group twice.
    trained = Counter(problem for one in records for problem in problems_of(one))
    assert max(trained.values()) == 1
    windows = {window for one in records for window in one.open_windows}
    assert sum(window.count for window in windows) == 6
