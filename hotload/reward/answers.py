"""Hold the answers of a dataset against the reward: what it cannot use costs no upload."""

from __future__ import annotations

from collections.abc import Sequence

from hotload.errors import InvalidProblemsError
from hotload.options import Problems, RewardSpec
from hotload.reward.built_ins import BUILT_INS, check_answer
from hotload.reward.outcome import WEIGHTED_SUM
from hotload.reward.weighted_sum import weighted_parts
from hotload.rollout.trajectory import Problem

ROWS_SHOWN = 5
FIELDS_SHOWN = 12


def check_answers(declared: Problems, problems: Sequence[Problem], reward: RewardSpec) -> None:
    """Refuse a dataset with answers that a built-in reward, or one of a sum, cannot use. Of a
    reward of the user's, and of a service, nothing is known.

    Raises:
        InvalidProblemsError: names the rows, the field and the way out.
        RewardError: the sum is declared wrongly.
    """
    is_sum = reward.name == WEIGHTED_SUM
    rewards = [part.reward for part in weighted_parts(reward)] if is_sum else [reward]
    for each in rewards:
        if each.name in BUILT_INS:
            _check(declared, problems, each)


def _check(declared: Problems, problems: Sequence[Problem], reward: RewardSpec) -> None:
    shown: list[str] = []
    count = 0
    for number, problem in enumerate(problems, 1):
        try:
            check_answer(reward.name, reward.arguments, problem)
        except ValueError as error:
            count += 1
            if len(shown) < ROWS_SHOWN:
                shown.append(f"row {number} (id {problem.id!r:.80}): {error}")
    if not count:
        return
    fields = ", ".join(sorted(problems[0].extra)[:FIELDS_SHOWN]) or "none"
    reason = (
        f"`{reward.name}` cannot use the answers of {count} of {len(problems)} rows, in the field"
        f" `{declared.answer_field}`: {'; '.join(shown)}. Name the field with the answer as"
        f" `problems.answer_field` (other fields of the first row: {fields}), leave these rows out,"
        " or choose another reward"
    )
    raise InvalidProblemsError(declared.dataset, 0, reason)
