"""See that a trainer's gradient is a sum of coefficient × gradient, before a service is trusted.

Some divide each row by the sum of its weights, or average over rows: then every negative advantage
is wrong by ten orders of magnitude, and nothing says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hotload.errors import TrainerError
from hotload.trainers.trainer import Trainer
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef

PROBE_IDS = (1, 2, 3, 4, 5)
SAME_ORDER = 30.0
TOLERANCE = 0.05
# Where no norm is told, a step moves the log-probabilities by at least this many nats; how far is
# only nearly proportional to the gradient.
MOVED_NATS = 0.02
MOVED_TOLERANCE = 0.25
RATES = tuple(10.0**power for power in range(-3, 4))
# With so small a gradient and so large an eps, AdamW's first step is proportional to it.
SMALL = 1e-3
LINEAR = AdamSettings(eps=1.0, weight_decay=0.0)

# Weights of each row that is sent: what a service is told, coefficients with the other sign.
ProbeRows = tuple[tuple[float, ...], ...]
ONE = (1.0, 1.0, 1.0, 1.0)
CASES: Mapping[str, ProbeRows] = {
    "one": (ONE,),
    "two": ((2.0, 2.0, 2.0, 2.0),),
    "minus": ((-1.0, -1.0, -1.0, -1.0),),
    "both signs": ((1.0, -1.0, 1.0, -1.0),),
    "twice": (ONE, ONE),
}


def probe_scale(trainer: Trainer) -> None:
    """Send one short sequence with other weights, and compare the norms of the gradient; the state
    before is loaded again.

    Call it before the first step: where no norm is told, it is taken from how far
    log-probabilities move in a first step.

    Raises:
        TrainerError: says which rule the gradient breaks.
    """
    start = trainer.save_state("scale-probe")
    sizes, tolerance = (
        {name: _told(trainer, rows) for name, rows in CASES.items()},
        TOLERANCE,
    )
    if any(size is None for size in sizes.values()):
        rate = next(
            (one for one in RATES if _moved(trainer, start, (ONE,), one) > MOVED_NATS), None
        )
        if rate is None:
            raise TrainerError(
                trainer.describe().model, "a step does not move its log-probabilities"
            )
        sizes = {name: _seen(trainer, start, rows, rate) for name, rows in CASES.items()}
        tolerance = MOVED_TOLERANCE
    trainer.load_state(start)
    found = {name: math.nan if size is None else size for name, size in sizes.items()}
    one = found["one"]
    rules = {
        "a weight of 2 gives twice the gradient of 1": found["two"] / 2,
        "a weight of −1 gives as large a gradient as 1": found["minus"],
        "a row that is sent twice gives twice the gradient": found["twice"] / 2,
    }
    for rule, size in rules.items():
        if not abs(size - one) <= tolerance * one:
            _refuse(trainer, rule, size, one)
    if not one / SAME_ORDER <= found["both signs"] <= one * SAME_ORDER:
        rule = "weights of both signs give a gradient of the same order"
        _refuse(trainer, rule, found["both signs"], one)


def _refuse(trainer: Trainer, rule: str, found: float, expected: float) -> None:
    raise TrainerError(
        trainer.describe().model,
        f"its gradient is no sum over weights: it breaks the rule that {rule} (found {found:.3g} "
        f"for {expected:.3g}). It divides or averages where it must add up, so that no loss with "
        "advantages of both signs can be trained with it: its provider must act",
    )


def _told(trainer: Trainer, rows: ProbeRows) -> float | None:
    """The norm that a step without a rate tells; no weight changes."""
    trainer.backward([PROBE_IDS] * len(rows), [-np.array(row) for row in rows])
    adam = AdamSettings(weight_decay=0.0)
    return trainer.step(adam, learning_rate=0.0, divisor=1.0).gradient_norm


def _moved(trainer: Trainer, start: StateRef, rows: ProbeRows, rate: float) -> float:
    """How far a step goes down the loss, in nats: rate × SMALL × the gradient's norm squared."""
    trainer.load_state(start)
    asked, weights = [PROBE_IDS] * len(rows), np.concatenate([np.array(row) for row in rows])
    before = np.concatenate(trainer.logprobs(asked))
    trainer.backward(asked, [-SMALL * np.array(row) for row in rows])
    trainer.step(LINEAR, learning_rate=rate, divisor=1.0)
    after = np.concatenate(trainer.logprobs(asked))
    return float(weights @ (after - before))


def _seen(trainer: Trainer, start: StateRef, rows: ProbeRows, rate: float) -> float:
    """The norm, from how far log-probabilities move; no number where they move the wrong way."""
    moved = _moved(trainer, start, rows, rate)
    return math.sqrt(moved / (rate * SMALL)) if moved > 0 else math.nan
