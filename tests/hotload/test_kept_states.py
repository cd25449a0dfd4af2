"""Which states of a training run stay, and that none goes which a run would come back from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.clients.store import Store
from hotload.clients.store.kept_states import (
    keep_for_branch,
    mark_removed,
    read_branches,
    read_removed,
)
from hotload.errors import IdentityConflictError
from hotload.training.kept_states import decide_states
from hotload.training.resume import plan_resume
from tests.hotload.test_resume import records_of

STEPS = st.sets(st.integers(1, 12))


def test_every_state_that_stays_says_why() -> None:
    records = records_of(12, saves=[2, 4, 5, 6, 8, 9, 10, 12], exports=[6, 9])
    kept = decide_states(
        records, newest=2, every=4, promoted=[3], branches={5: ["mine", "yours"]}, lost=[10]
    )
    assert kept == {
        2: "step 3 is promoted",
        4: "every 4 steps",
        5: "the beginning of mine, yours",
        8: "every 4 steps",
        9: "before the newest export",
        12: "newest",
    }
    assert decide_states(
        records_of(3), newest=2, every=None, promoted=(), branches={}, lost=()
    ) == {2: "one of the newest 2", 3: "newest"}
    everything = decide_states(records, newest=None, every=None, promoted=(), branches={}, lost=())
    assert list(everything) == [2, 4, 5, 6, 8, 9, 10, 12]
    assert decide_states([], newest=2, every=None, promoted=(), branches={}, lost=()) == {}


@given(STEPS, STEPS, STEPS, st.integers(2, 4), st.booleans())
def test_nothing_goes_that_a_run_comes_back_from(
    saves: set[int], exports: set[int], lost: set[int], newest: int, is_here: bool
) -> None:
    records = records_of(12, saves=[*saves], exports=[*exports])
    kept = decide_states(records, newest=newest, every=None, promoted=(), branches={}, lost=lost)
    assert len(kept) <= newest + 1
    gone = saves - kept.keys()
    before = plan_resume(records, is_here=is_here, lost=lost)
    assert plan_resume(records, is_here=is_here, lost=gone) == before


async def test_a_branch_and_a_removal_see_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    await keep_for_branch(store, "learn", 3, "a-branch")
    await mark_removed(store, "learn", [2, 3])
    assert await read_branches(store, "learn") == {3: ["a-branch"]}
    assert await read_removed(store, "learn") == {2, 3}
    await keep_for_branch(store, "learn", 3, "a-branch")  # started again, it is its own still
    with pytest.raises(IdentityConflictError, match="state of step 2 was removed, as keep_states"):
        await keep_for_branch(store, "learn", 2, "late")
    assert await read_branches(store, "learn") == {3: ["a-branch"]}
