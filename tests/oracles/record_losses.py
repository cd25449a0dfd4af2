"""Records what torch differentiates the losses to:
PYTHONPATH=.:tests/hotload .trainers-venv/bin/python tests/oracles/record_losses.py

`make oracles` compares with torch itself; the recording guards the same in `make test`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path

import torch
from loss_cases import SETTINGS, random_samples
from torch_losses import evaluate

from hotload.training.policy_loss import PolicyLoss

DIRECTORY = Path(__file__).parents[1] / "golden" / "losses"
SEED = 20
README = """\
# Recorded from torch

- `autograd.json`: seven losses, each in several settings, with their sum and the derivative by
  every policy log-probability as torch {torch} differentiates the expressions of
  `tests/oracles/torch_losses.py`, seed {seed}. A token is
  `[policy, anchor, sampler, reference, advantage, in the loss]`.
- Used by `tests/hotload/test_losses.py`. `make oracles` compares with torch itself;
  `tests/oracles/record_losses.py` says how to record again.

| File | Bytes | SHA-256 |
|---|---|---|
| `autograd.json` | {size} | `{digest}` |
"""


def record() -> None:
    """Write the cases and their README."""
    samples = random_samples(SEED)
    cases = []
    for settings in SETTINGS:
        total, gradient = evaluate(PolicyLoss(**settings), samples)
        cases.append({"settings": settings, "loss": total, "gradient": gradient})
    written = {"samples": [[astuple(t) for t in sample] for sample in samples], "cases": cases}
    DIRECTORY.mkdir(exist_ok=True)
    lines = json.dumps(written).replace('{"settings"', '\n{"settings"') + "\n"
    (DIRECTORY / "autograd.json").write_text(lines, encoding="utf-8")
    digest = hashlib.sha256(lines.encode()).hexdigest()
    version = torch.__version__.partition("+")[0]
    text = README.format(torch=version, seed=SEED, size=len(lines.encode()), digest=digest)
    (DIRECTORY / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record()
