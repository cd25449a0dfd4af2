"""The work of a sampling process: values alone, which it is handed over a pipe."""

from dataclasses import dataclass

from hotload.clients.inference.sampler import InferenceSource
from hotload.clients.store.store import Store
from hotload.dataset.rollout_plan import RolloutPlan
from hotload.sampling.stamp import Stamp
from hotload.spec import CycleSpec


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """The parts of a plan that one process samples, and its share of the window's slots."""

    spec: CycleSpec
    plan: RolloutPlan
    client: InferenceSource
    store: Store
    stamp: Stamp
    slots: int
    is_breaker_open: bool = False
