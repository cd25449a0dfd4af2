"""Make the trainer that a declaration names."""

from __future__ import annotations

import os
from typing import cast

from hotload.errors import HotLoadError, TrainerError
from hotload.sampling.reward.user_errors import describe_exception, secret_values
from hotload.sampling.user_function import import_function
from hotload.trainers.trainer import Trainer
from hotload.training.settings import TrainerFunction

METHODS = ("describe", "logprobs", "backward", "step", "save_state", "load_state", "export")


def load_trainer(declared: TrainerFunction) -> Trainer:
    """Call the declared function, and see that what it returns is a trainer.

    Raises:
        TrainerError: not importable, it cannot take its arguments, it raised, or a method is
            missing.
        HotLoadError: what a trainer of this library raises by itself.
    """
    function = import_function(declared.name, declared.arguments, TrainerError)
    try:
        trainer = function(**declared.arguments)
    except HotLoadError:
        raise
    except Exception as error:  # code of theirs may raise anything
        why = f"raised {describe_exception(error, secret_values(os.environ))}"
        raise TrainerError(declared.name, why) from error
    missing = [name for name in METHODS if not callable(getattr(trainer, name, None))]
    if missing:
        found = f"returned {type(trainer).__name__} without {', '.join(missing)}"
        raise TrainerError(declared.name, f"{found}; expected a trainer (docs/training.md)")
    return cast(Trainer, trainer)
