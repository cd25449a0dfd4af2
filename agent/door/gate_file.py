"""The file that declares a gate by samples: what is asked, what scores it, how far is too far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from agent.door.gate_verdict import PROBLEMS_NEEDED, GateLimits
from hotload.declared_file import field_meant, read_yaml
from hotload.options import Declared, Problems, RewardSpec, Sampling
from hotload.rollout.engines.known import EngineName
from hotload.spec import dataset_location

PROBLEMS = 200
PROBLEMS_LIMIT = 10_000
OF_A_ROLLOUT = {
    "groups",
    "include_routing_matrix",
    "max_head_offpolicy_versions",
    "nodes",
    "problems_per_task",
    "processes",
}


class GateSpec(Declared):
    """What a gate asks canaries and the rest alike, and what it lets through."""

    engine: EngineName
    """Which kind of server the agents stand beside, as in a rollout block."""
    model: str = Field(min_length=1, max_length=1024)
    """The name that the servers serve the model under."""
    path_prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] | None = None
    """What stands before the paths of inference."""
    problems: Problems
    """What to ask: the first `max_rows` rows, 200 where that is left out."""
    sampling: Sampling = Sampling()
    """How every problem is sampled."""
    reward: RewardSpec = RewardSpec()
    """What scores a sample."""
    limits: GateLimits = GateLimits()
    """What the canaries are held to."""

    @field_validator("engine")
    @classmethod
    def _is_beside_an_agent(cls, engine: EngineName) -> EngineName:
        if engine in ("fireworks", "mlx"):
            raise ValueError(f"no agent stands beside {engine}")
        return engine

    @field_validator("problems")
    @classmethod
    def _enough(cls, problems: Problems) -> Problems:
        if problems.prompt_groups_per_step is not None:
            raise ValueError("prompt_groups_per_step has no meaning here: every one is asked")
        count = problems.max_rows or PROBLEMS
        if not PROBLEMS_NEEDED <= count <= PROBLEMS_LIMIT:
            raise ValueError(f"max_rows: expected {PROBLEMS_NEEDED} to {PROBLEMS_LIMIT}")
        located = {"dataset": dataset_location(problems.dataset), "max_rows": count}
        return problems.model_copy(update=located)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if unused := sorted(self.sampling.model_fields_set & OF_A_ROLLOUT):
            raise ValueError(f"sampling.{unused[0]} has no meaning in a gate; remove it")
        return self


def read_gate(path: Path) -> GateSpec:
    """Read the gate that a file declares.

    Raises:
        ValueError: the file declares no gate; names every field that is wrong, no value.
        OSError: the file cannot be read.
    """
    given = read_yaml(path)
    try:
        return GateSpec.model_validate(given)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}"
            + (field_meant(GateSpec, one["loc"]) if one["type"] == "extra_forbidden" else "")
            for one in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise ValueError(f"{path}: {'; '.join(lines)}") from None
