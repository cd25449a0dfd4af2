"""Which states of a training run stay, and why: the others may be removed.

What a run goes on from always stays, so a removal takes nothing that a resumption would load. This
module decides; `tasks.training.retain_states` removes, and `hotload.clients.store.kept_states` has
what both remember.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from hotload.training.resume import exported_step, newest_state
from hotload.training.step_record import StepRecord


def decide_states(
    records: Sequence[StepRecord],
    *,
    newest: int | None,
    every: int | None,
    promoted: Iterable[int],
    branches: Mapping[int, Sequence[str]],
    lost: Collection[int],
) -> dict[int, str]:
    """Say of every state that stays why it does, by its step.

    Args:
        records: every step of the run, in order.
        newest: how many of the newest stay; None keeps all.
        every: those of every so many steps stay, too.
        promoted: steps whose versions have a name; what they are made again from stays.
        branches: the runs that begin with the state of a step, by that step.
        lost: steps whose state is removed or of no use.
    """
    saved = [one.step for one in records if one.state is not None and one.step not in lost]
    reasons = {
        newest_state(records[: exported_step(records)], lost): "before the newest export",
        newest_state(records, lost): "newest",
    }
    for step in promoted:
        reasons.setdefault(newest_state(records[:step], lost), f"step {step} is promoted")
    for step, runs in branches.items():
        reasons.setdefault(step, f"the beginning of {', '.join(runs)}")
    for step in saved if newest is None else saved[-newest:]:
        reasons.setdefault(step, "all stay" if newest is None else f"one of the newest {newest}")
    for step in saved:
        if every and step % every == 0:
            reasons.setdefault(step, f"every {every} steps")
    return {step: reasons[step] for step in saved if step in reasons}
