"""The client alone: 4,000 streamed samples of 128 tokens with log-probabilities, 256 in flight.

A stub service in its own process; on this side, in turns and in one run: this client; a loop by
hand on aiohttp with the same parsing; and the `openai` client as it comes. Then where a sample's
CPU goes, and how the window takes ten bad seconds.
"""

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import orjson
from openai import AsyncOpenAI
from pydantic import SecretStr

from benchmarks.profiles import print_costs
from benchmarks.stub_service import PROMPT
from examples.processes import free_port, process
from hotload.clients.access import Access
from hotload.clients.inference.attempt import Chunks
from hotload.clients.inference.client import InferenceClient
from hotload.options import Concurrency, Sampling
from hotload.publish import fireworks_names
from hotload.rollout import completions_api
from hotload.rollout.engines.fireworks import sample_body
from hotload.rollout.request import first_request
from hotload.rollout.trajectory import Problem

BAR_OF_HAND, BAR_OF_OPENAI = 0.85, 5.0
STORM_BAR, INTERVALS_BAR = 1.5, 3
IDENTITY = "bench-000001-00000000"
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
KEY = SecretStr("bench")
MODEL = fireworks_names.model_name("bench", "tiny")
HEADERS = {
    "Authorization": "Bearer bench",
    "Content-Type": "application/json",
    "Accept-Encoding": "identity",
    fireworks_names.MODEL_HEADER: MODEL,
    fireworks_names.DEPLOYMENT_HEADER: fireworks_names.deployment_name("bench", "fleet"),
}
Sampled = list[tuple[Sequence[int], Sequence[float]]]
Side = Callable[[str, argparse.Namespace, int], Awaitable[Sampled]]


def sampling_of(options: argparse.Namespace, **fields: Any) -> Sampling:
    """What is asked for."""
    window = Concurrency(mode="fixed", initial_window=options.in_flight)
    fields = {"concurrency": window, **fields}
    return Sampling(max_completion_tokens=options.tokens, **fields)


def problem_of(number: int) -> Problem:
    """The problems differ by name alone."""
    return Problem(f"p{number}", prompt=tuple(PROMPT))


async def ours(url: str, options: argparse.Namespace, count: int) -> Sampled:
    """Ids and log-probabilities by this client."""
    client = InferenceClient(Access(base_url=url, api_key=KEY, **NAMES))
    async with client.session(sampling_of(options), identity=IDENTITY, policy_version=1) as sampler:
        samples = await asyncio.gather(
            *(sampler.sample(problem_of(number), 0) for number in range(count))
        )
    assert not any(sample.failure for sample in samples)
    return [
        (segment.token_ids_T, segment.sampling_logprobs_T)
        for sample in samples
        for segment in sample.segments
    ]


async def _in_flight(options: argparse.Namespace, count: int, send: Any) -> Sampled:
    gate = asyncio.Semaphore(options.in_flight)

    async def sample(number: int) -> Any:
        async with gate:
            return await send(number)

    return list(await asyncio.gather(*(sample(number) for number in range(count))))


async def by_hand(url: str, options: argparse.Namespace, count: int) -> Sampled:
    """Ids and log-probabilities by a loop on aiohttp with the same parsing."""
    sampling, target = sampling_of(options), url + fireworks_names.COMPLETIONS_PATH
    connector = aiohttp.TCPConnector(limit=options.in_flight)
    async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:

        async def send(number: int) -> Any:
            problem = problem_of(number)
            request = first_request(
                problem, 0, sampling=sampling, identity=IDENTITY, policy_version=1
            )
            body = sample_body(request, MODEL)
            answer = completions_api.Answer(sampling, problem.prompt)
            chunks = Chunks(answer)
            async with session.post(target, data=orjson.dumps(body)) as response:
                async for piece in response.content.iter_any():
                    chunks.feed(piece)
            assert answer.finish() is None
            return answer.token_ids, answer.sampling_logprobs

        return await _in_flight(options, count, send)


async def by_openai(url: str, options: argparse.Namespace, count: int) -> Sampled:
    """Ids and log-probabilities by the `openai` client as it comes."""
    extra = {
        "raw_output": True,
        "perf_metrics_in_response": True,
        "top_k": 0,
        "context_length_exceeded_behavior": "error",
    }
    async with AsyncOpenAI(
        base_url=f"{url}/inference/v1", api_key="bench", default_headers=HEADERS
    ) as client:

        async def send(number: int) -> Any:
            tokens: list[int] = []
            logprobs: list[float] = []
            stream = await client.completions.create(
                model=MODEL,
                prompt=PROMPT,
                n=1,
                max_tokens=options.tokens,
                temperature=1.0,
                top_p=1.0,
                logprobs=True,  # type: ignore[arg-type]
                stream=True,
                seed=number,
                extra_body=extra,
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    for entry in choice.logprobs.content:  # type: ignore[union-attr]
                        tokens.append(entry["token_id"])
                        logprobs.append(entry["sampling_logprob"])
            return tokens, logprobs

        return await _in_flight(options, count, send)


SIDES: dict[str, Side] = {
    "this client": ours,
    "by hand": by_hand,
    "openai": by_openai,
}


@contextmanager
def stub(root: Path, *arguments: str) -> Any:
    """The stub service in its own process; yields its address."""
    port = free_port()
    command = ["-m", "benchmarks.stub_service", "--port", str(port), *arguments]
    url = f"http://127.0.0.1:{port}"
    with process(command, root / "stub.log", url):
        yield url


def timed(side: Side, url: str, options: argparse.Namespace, count: int) -> tuple[float, float]:
    """Wall and CPU seconds of `count` samples."""
    gc.collect()
    gc.freeze()  # one full collection of what was imported costs as much as a hundred samples
    wall, cpu = time.perf_counter(), time.process_time()
    sampled = asyncio.run(side(url, options, count))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for tokens, logprobs in sampled:
        if not len(tokens) == len(logprobs) == options.tokens:
            raise SystemExit(f"{len(tokens)} tokens, {len(logprobs)} log-probabilities")
    return wall, cpu


def compare(url: str, options: argparse.Namespace) -> dict[str, float]:
    """Print the sides in turns; the median of each side's wall time over ours."""
    ratios: dict[str, list[float]] = {name: [] for name in SIDES}
    cpu_ratios: dict[str, list[float]] = {name: [] for name in SIDES}
    columns = "".join(f"{name:>24}" for name in SIDES)
    print(f"{'turn':4}{columns}    (samples/s, CPU ms per sample)")
    for turn in range(options.turns):
        taken = {}
        for name, side in SIDES.items():
            # Every sample costs the same; the slow side does fewer.
            count = options.samples // 8 if name == "openai" else options.samples
            wall, cpu = timed(side, url, options, count)
            taken[name] = (wall / count, cpu / count)
            ratios[name].append(taken[name][0] / taken["this client"][0])
            cpu_ratios[name].append(taken[name][1] / taken["this client"][1])
        shown = "".join(f"{1 / wall:15.0f} {1e3 * cpu:8.2f}" for wall, cpu in taken.values())
        print(f"{turn + 1:4}{shown}", flush=True)
    shown = "".join(f"{statistics.median(values):24.2f}" for values in cpu_ratios.values())
    print(f"CPU {shown}    (median, times this client's)")
    return {name: statistics.median(values) for name, values in ratios.items()}


async def _through(url: str, options: argparse.Namespace) -> tuple[list[float], int, Any]:
    """Moments at which samples ended, how many failed, the window's trace."""
    window = Concurrency(initial_window=64, max_window=64)
    client = InferenceClient(Access(base_url=url, api_key=KEY, **NAMES))
    ended: list[float] = []
    failed = 0
    async with client.session(
        sampling_of(options, concurrency=window), identity=IDENTITY, policy_version=1
    ) as sampler:

        async def sample(number: int) -> None:
            nonlocal failed
            sampled = await sampler.sample(problem_of(number), 0)
            failed += sampled.failure is not None
            ended.append(time.monotonic())

        await asyncio.gather(*(sample(number) for number in range(options.storm_samples)))
        return ended, failed, sampler.trace()


def storm(url: str, options: argparse.Namespace) -> bool:
    """Print how ten bad seconds went; whether the bars are met."""
    started = time.monotonic()
    ended, failed, trace = asyncio.run(_through(url, options))
    with urlopen(url, timeout=60) as told:
        seen = json.load(told)
    bad_from, bad_until = started + options.slow_at, started + options.slow_at + 10
    before = sum(bad_from - 2 <= at < bad_from for at in ended) / 2
    interval = Concurrency().rollout_adjustment_interval
    after = [at for at in sorted(ended) if at >= bad_until]
    # The first interval whose own rate is nine tenths of the rate before.
    back = next(
        (
            number
            for number in range(len(after) // interval - 1)
            if interval / (after[(number + 1) * interval] - after[number * interval])
            >= 0.9 * before
        ),
        None,
    )
    sent = seen["requests"] / options.storm_samples
    narrowest = min(point.size for point in trace)
    rate = sum(bad_from <= at < bad_until for at in ended) / 10
    print(
        f"\nten bad seconds: {before:.0f} samples/s before, {rate:.0f} during;"
        f" window 64 → {narrowest} → {trace[-1].size};"
        f" back after {back} intervals of {interval}; {failed} samples lost;"
        f" {seen['refused']} refusals, {sent:.2f} requests per sample"
    )
    return back is not None and back <= INTERVALS_BAR and not failed and sent < STORM_BAR


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="The rollout client against other ways.")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--costs", type=int, default=5, help="lines of the profile")
    parser.add_argument("--events-per-write", type=int, default=8)
    parser.add_argument("--slow-at", type=float, default=4.0)
    parser.add_argument("--storm-samples", type=int, default=6000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        form = ["--tokens", str(options.tokens)]
        form += ["--events-per-write", str(options.events_per_write)]
        with stub(root, *form) as url:
            ratios = compare(url, options)
            count = options.samples // 2
            print_costs(lambda: asyncio.run(ours(url, options, count)), count, options.costs)
        with stub(root, *form, "--latency", "0.2", "--slow-at", str(options.slow_at)) as url:
            is_calm = storm(url, options)
    of_hand, of_openai = ratios["by hand"], ratios["openai"]
    print(f"\nof the loop by hand: {of_hand:.2f} (bar {BAR_OF_HAND})")
    print(f"times openai: {of_openai:.1f} (bar {BAR_OF_OPENAI:g})")
    print(f"bad seconds: {'within' if is_calm else 'OUTSIDE'} the bars")


if __name__ == "__main__":
    main()
