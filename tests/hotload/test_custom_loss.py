"""A user's own loss for numpy; `make oracles` has the same for torch."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hotload.training.custom_loss import custom_coefficients
from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PolicyLoss
from tests.hotload.loss_cases import inputs_of, random_samples


def test_a_users_loss_gives_coefficients_as_ours_do() -> None:
    loss = PolicyLoss(policy_loss="importance_sampling", tis=None)
    inputs, policy = inputs_of(random_samples(2), loss)

    def own(given: LossInputs, logprobs_T: Any) -> Any:
        ratio = np.exp(logprobs_T - given.anchor_logprobs_T)
        losses = -ratio * given.advantages_T * given.loss_mask_T
        return losses.sum(), losses, {"ratio": ratio.mean()}

    found = custom_coefficients(own, inputs, policy, uses="numpy")
    expected = loss.prepare(inputs).coefficients(policy)
    assert found.coefficients_T == pytest.approx(expected.coefficients_T, rel=1e-12)
    assert found.loss == pytest.approx(expected.figures.loss)
    assert found.metrics == {"ratio": pytest.approx(1, abs=0.5)}


GIVEN = LossInputs.of(
    lengths=[3],
    loss_mask_T=[True, False, True],
    advantages=[1.0],
    sampling_logprobs_T=[-1.0, math.nan, -1.0],
)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (1.0, "returned float, expected (loss, coefficients_T, metrics)"),
        ((1.0, [0, 0, 0]), "returned tuple"),
        ((math.nan, [0, 0, 0], {}), "a loss of nan, expected a finite number"),
        ((0.0, [0, 0], {}), "coefficients of shape (2,), expected (3,)"),
        ((0.0, [0, 0, math.inf], {}), "a coefficient of inf at token 2"),
        ((0.0, [math.nan, 0, 0], {}), "a coefficient of nan at token 0"),
        ((0.0, [1, 1, 1], {}), "token 1, where the loss mask is false"),
        ((0.0, [1, 0, 1], [1]), "metrics of type list, expected a mapping"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_names_the_function(returned: Any, found: str) -> None:
    def own(_: LossInputs, __: Any) -> Any:
        return returned

    with pytest.raises(ValueError, match=rf"own.*{re.escape(found)}.*its author must act"):
        custom_coefficients(own, GIVEN, [-1.0, math.inf, -1.0], uses="numpy")


def test_what_is_masked_is_nothing_to_the_function() -> None:
    seen = []

    def own(given: LossInputs, logprobs_T: Any) -> Any:
        seen.extend([given.sampling_logprobs_T, logprobs_T])
        return 0.0, np.zeros(3), {}

    custom_coefficients(own, GIVEN, [-1.0, math.inf, -2.0], uses="numpy")
    assert [each.tolist() for each in seen] == [[-1, 0, -1], [-1, 0, -2]]


def test_nothing_here_brings_torch_or_a_data_frame() -> None:
    script = (
        "import sys, importlib, hotload.training\n"
        "for name in hotload.training.__all__:\n"
        "    importlib.import_module(f'hotload.training.{name}')\n"
        "heavy = {'torch', 'polars', 'pandera', 'prefect', 'httpx'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
