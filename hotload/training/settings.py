"""What every part of a training declaration has in common, and what names a trainer and a state."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue

from hotload.options import FunctionName, one_line_descriptions
from hotload.records import Record, Sha256

Label = Annotated[str, Field(min_length=1, max_length=4096)]


class TrainingPart(Record):
    """A frozen part of a training declaration; unknown fields are refused.

    A record of a step stores such parts as they were, with every value in force.
    """

    model_config = ConfigDict(
        use_attribute_docstrings=True, json_schema_extra=one_line_descriptions
    )


class TrainerFunction(TrainingPart):
    """The trainer, made by the user's own code or by one that comes with the library."""

    name: FunctionName
    """`package.module:function`: called with the arguments, it returns a
    `hotload.trainers.trainer.Trainer`."""
    arguments: dict[str, JsonValue] = Field({}, max_length=256)
    """Keyword arguments for the function. Everybody who may look at the server sees them: keys
    belong in the worker's environment."""


class StateRef(Record):
    """Names a saved state: masters, optimizer, schedule and random state, which resume a run."""

    path: Label
    """As the trainer returned it, which may differ from what it was asked for."""
    sha256: Sha256
