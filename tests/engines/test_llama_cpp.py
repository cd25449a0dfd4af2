"""llama.cpp's server itself, on a model that is small enough to be worked out beside it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from examples.numpy_llama import NumpyLlama
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.errors import ServiceRefusedError
from hotload.options import Sampling
from hotload.rollout.trajectory import Problem, Trajectory
from tests.engines.gguf_model import BYTES, LETTERS, SPECIAL, config_of, weights_of, write_gguf
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
PROMPT = (1, 9, 30)
PRECISION = 0.02  # its activations come from tables of half precision


def serve(path: Path, vocabulary: list[Any]) -> Iterator[str]:
    config = config_of(vocabulary)
    write_gguf(path, vocabulary, config, weights_of(config))
    command = [sys.executable, "-m", "tests.engines.serve_llama_cpp", str(path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
        process.stdin.close()


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose every token is a whole letter."""
    yield from serve(tmp_path_factory.mktemp("letters") / "m.gguf", SPECIAL + LETTERS)


@pytest.fixture(scope="session")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose tokens are bytes."""
    yield from serve(tmp_path_factory.mktemp("bytes") / "m.gguf", SPECIAL + BYTES)


def client(address: str, **fields: Any) -> InferenceClient:
    access = Access("a", "m", "d", base_url=address, dialect="plain")
    return InferenceClient(access, engine="llama.cpp", **fields)


async def sampled(address: str, count: int, **settings: Any) -> list[Trajectory]:
    sampling = Sampling(max_completion_tokens=24, **settings)
    async with client(address).session(sampling, identity="run-1", policy_version=1) as sampler:
        problem = Problem("p", prompt=PROMPT)
        return [await sampler.sample(problem, number) for number in range(count)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def expected(logits: np.ndarray, token: int, sampling: Sampling) -> float:
    """Its log-probability: of the filtered, then of the tempered distribution, in its order."""
    order = np.argsort(-logits)[: sampling.top_k or None]
    shares = np.exp(log_softmax(logits[order]))
    kept = [*order[: int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1]]
    if token not in kept:  # as likely as the last one, to the precision of its tables
        assert logits[token] == pytest.approx(logits[kept[-1]], abs=PRECISION)
        kept[-1] = token
    return float(log_softmax(logits[kept] / sampling.temperature)[kept.index(token)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    ],
)
async def test_log_probabilities_are_of_what_was_sampled(
    letters: str, settings: dict[str, Any]
) -> None:
    config = config_of(SPECIAL + LETTERS)
    model, sampling = NumpyLlama(config, weights_of(config)), Sampling(**settings)
    trajectories = await sampled(letters, 8, **settings)
    ends = {trajectory.finish_reason for trajectory in trajectories}
    seen = set()
    for trajectory in trajectories:
        assert trajectory.failure is None, trajectory.detail
        assert not trajectory.provenance.failed_attempts
        [segment] = trajectory.segments
        sequence = [*PROMPT, *segment.token_ids_T]
        [logits], _ = model.forward([sequence])
        told = zip(segment.token_ids_T, segment.sampling_logprobs_T, strict=True)
        for position, (token, logprob) in enumerate(told, start=len(PROMPT) - 1):
            wanted = expected(logits[position], token, sampling)
            assert logprob == pytest.approx(wanted, abs=PRECISION)
        seen.add(segment.token_ids_T)
    assert len(seen) == 8  # seeds are heeded
    assert ends <= {"stop", "length"}


def test_its_own_defaults_would_cut_the_policy(letters: str) -> None:
    """What has to be switched off by every request: that is why the neutral values are sent."""
    told = httpx.get(f"{letters}/props", timeout=PATIENCE_SECONDS).json()
    settings = told["default_generation_settings"]["params"]
    assert settings["min_p"] == pytest.approx(0.05)
    body = {"prompt": [*PROMPT], "max_tokens": 1, "logprobs": 1, "post_sampling_probs": True}
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    asked = {**body, **whole, "seed": 3}
    url = f"{letters}/v1/completions"
    answer = httpx.post(url, json=asked, timeout=PATIENCE_SECONDS).json()
    [entry] = answer["choices"][0]["logprobs"]["content"]
    config = config_of(SPECIAL + LETTERS)
    [logits], _ = NumpyLlama(config, weights_of(config)).forward([[*PROMPT, 0]])
    own = np.exp(log_softmax(logits[-1]))[entry["id"]]
    assert entry["prob"] > own + 0.002


async def test_tokens_that_it_leaves_out_fail_the_sample(bytes_: str) -> None:
    """Bytes that are no whole letter: never are the others taken for all."""
    trajectories = await sampled(bytes_, 24)
    failures = {trajectory.failure for trajectory in trajectories}
    assert failures <= {None, "malformed"}
    assert "malformed" in failures


async def test_the_preflight_takes_it(letters: str) -> None:
    await client(letters).ask_first(Sampling(temperature=0.7, top_p=0.9))
    [line] = await client(letters).check()
    assert line.ok


async def test_what_it_cannot_do_is_refused(letters: str) -> None:
    with pytest.raises(ServiceRefusedError, match="404"):
        await client(letters, path_prefix="/nowhere").ask_first(Sampling())
    sampling = Sampling(max_completion_tokens=4)
    async with client(letters).session(sampling, identity="run-1", policy_version=1) as sampler:
        long = await sampler.sample(Problem("p", prompt=(5,) * 4000), 0)
        assert long.failure == "refused"
        unknown = await sampler.sample(Problem("p", prompt=(99_999,)), 0)
        assert unknown.failure == "refused"
        with pytest.raises(ServiceRefusedError, match=r"ask llama\.cpp token ids alone"):
            await sampler.sample(Problem("p", prompt="text"), 0)
