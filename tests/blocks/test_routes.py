"""Routes from an engine with experts to the rows of a trainer, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from emulator.control.settings import EmulatorConfig
from emulator.engine.weights import load_llama
from emulator.server import RunningEmulator
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.sampler import Sampler
from hotload.dataset.parquet import parse_rollouts, render_rollouts
from hotload.dataset.table import rollouts_frame
from hotload.dataset.trainer_batch import make_batch
from hotload.options import Sampling
from hotload.rollout.routing import read_routes
from hotload.rollout.trajectory import Problem, Segment
from tests.factories import scored_group

BASE = Path(__file__).parents[1] / "emulator" / "fixtures" / "qwen3_moe"
KEY = "a-key"
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
PROBLEM = Problem("p", prompt=(3, 61, 0, 17), answer="")
pytestmark = pytest.mark.server


@pytest.fixture
def service(
    tmp_path: Path, emulators: Callable[[EmulatorConfig], RunningEmulator]
) -> AsyncIterator[InferenceClient]:
    """Serves a mixture of experts."""
    config = EmulatorConfig(
        bucket=tmp_path.as_uri(),
        base_model=BASE,
        replica_count=2,
        api_key=KEY,
        **NAMES,  # type: ignore[arg-type]
    )
    with emulators(config) as running:
        yield InferenceClient(Access(base_url=running.url, api_key=KEY, **NAMES))


@asynccontextmanager
async def sampler_of(service: InferenceClient) -> AsyncIterator[Sampler]:
    sampling = Sampling(max_completion_tokens=6, include_routing_matrix=True)
    async with service.session(sampling, identity="base", policy_version=0) as sampler:
        yield sampler


def computed(segment: Segment) -> np.ndarray:
    """The experts of every token but the last, as the model has them: 2 of 8 in 2 of 3 layers."""
    weights = load_llama(BASE)
    cache = weights.empty_cache()
    weights.forward((*segment.prompt_token_ids, *segment.token_ids_T)[:-1], cache)
    return cache.experts[: cache.length].reshape(cache.length, 4).astype(np.int16)


def told(segment: Segment) -> np.ndarray:
    assert segment.routes is not None
    return read_routes(segment.routes, len(segment.prompt_token_ids) + len(segment.token_ids_T))


async def test_every_sampled_token_has_the_experts_that_predicted_it(
    service: InferenceClient,
) -> None:
    async with sampler_of(service) as sampler:
        samples = [await sampler.sample(PROBLEM, number) for number in range(3)]
    for sample in samples:
        assert sample.failure is None
        (segment,) = sample.segments
        routes, expected = told(segment), computed(segment)
        assert len(routes) == 4 + len(segment.token_ids_T) - 1
        assert (routes[:3] == -1).all()  # of the prompt, but its last token
        assert (routes[3:] == expected[3:]).all()
    frame = rollouts_frame([scored_group(*samples)], run_id="run", policy_version=0)
    frame, _ = parse_rollouts(render_rollouts(frame, digest="0" * 64), path="p")
    for sample, kept in zip(samples, make_batch(frame).routes, strict=True):
        assert kept is not None
        assert (kept == told(sample.segments[0])).all()


async def test_what_was_said_between_two_turns_has_none(service: InferenceClient) -> None:
    async with sampler_of(service) as sampler:
        conversation = sampler.converse(PROBLEM, 0)
        first = await conversation.sample([3, 61, 0, 17])
        known = [*first.prompt_token_ids, *first.token_ids]
        second = await conversation.sample([*known, 5, 9])
        sample = conversation.trajectory()
    (segment,) = sample.segments
    routes, expected = told(segment), computed(segment)
    was_sampled = np.array([False] * 3 + list(segment.loss_mask_T))
    assert was_sampled.sum() == len(first.token_ids) + len(second.token_ids)
    assert (routes[was_sampled] == expected[was_sampled]).all()
    assert (routes[~was_sampled] == -1).all()
    # Segments that a rollout function made of the same tokens keep them.
    mask = (False,) * len(segment.loss_mask_T)
    own = Segment(segment.prompt_token_ids, segment.token_ids_T, segment.sampling_logprobs_T, mask)
    assert conversation.trajectory(segments=[own]).segments[0].routes == segment.routes
