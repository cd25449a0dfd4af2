"""Memory of a long rollout: 100,000 samples of 1,000 tokens, scored and streamed to Parquet.

The whole path of a cycle's rollouts but the network: the answers are made in this process, at most
256 at once, with token ids and log-probabilities of their own, so that nothing is shared between
samples. Groups go through gate, reward, rules and part files into a store on disk. Bar: the peak of
the resident memory stays 400 MiB above where it began; the peak in each tenth of the run shows
whether it grows.
"""

import argparse
import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from hotload.clients.inference.conversation import Conversation, Outcome
from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import plan_rollout
from hotload.rollout.breaker import Breaker
from hotload.rollout.completions_api import Answer
from hotload.rollout.request import Request, first_request
from hotload.rollout.trajectory import Problem
from hotload.sampling.reward.scorer import open_scorer
from hotload.sampling.rollout import Rollout
from hotload.spec import CycleSpec

BAR_MIB = 400
IDENTITY = "bench-000001-00000000"
IN_FLIGHT = 256
VOCABULARY = range(1000, 150_000)


class CannedSampler:
    """What a rollout needs of a sampler; every answer is new objects of the size of a real one."""

    def __init__(self, spec: CycleSpec, tokens: int) -> None:
        self.sampling = spec.sampling
        self.size = IN_FLIGHT
        self.identity = IDENTITY
        self.breaker = Breaker()
        self._tokens = tokens

    def converse(self, problem: Problem, number: int, *, is_hedge: bool = False) -> Conversation:
        """A conversation whose turns are answered here."""
        request = first_request(
            problem,
            number,
            sampling=self.sampling,
            identity=IDENTITY,
            policy_version=1,
            is_hedge=is_hedge,
        )
        return Conversation(self._ask, request)

    async def _ask(self, request: Request, on_attempt: Any, on_end: Any) -> Outcome:
        on_attempt()
        await asyncio.sleep(0)
        count = self._tokens
        answer = Answer(request.sampling, tuple(random.choices(VOCABULARY, k=32)))
        answer.token_ids = tuple(random.choices(VOCABULARY, k=count))
        answer.sampling_logprobs = [-random.random() for _ in range(count)]
        answer.text, answer.finish_reason = "word " * count, "length"
        answer.observed, answer.last_identity = [IDENTITY], IDENTITY
        answer.runs = [(0, IDENTITY)]
        on_end(None)
        return Outcome(answer, None)

    def trace(self) -> tuple[()]:
        """No window, no path."""
        return ()


@contextmanager
def watched() -> Iterator[list[tuple[float, int]]]:
    """(seconds, resident bytes) every 50 ms, from the first moment on."""
    process, seen, stop = psutil.Process(), [], threading.Event()
    started = time.monotonic()

    def look() -> None:
        while not stop.wait(0.05):
            seen.append((time.monotonic() - started, process.memory_info().rss))

    seen.append((0.0, process.memory_info().rss))
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


async def roll_out(root: Path, problems: int, samples: int, tokens: int) -> int:
    """Everything through the rollout engine; bytes of Parquet."""
    spec = CycleSpec.model_validate(
        {
            "checkpoint": str(root),
            "work_dir": str(root),
            "run_id": "bench",
            "policy_version": 1,
            "problems": {"dataset": str(root / "none")},
            "sampling": {"completions_per_prompt": samples, "max_completion_tokens": tokens},
            "reward": {"name": "length", "arguments": {"target": tokens}},
        }
    )
    plan = plan_rollout(spec, IDENTITY, [Problem(str(n), "x") for n in range(problems)])
    store = Store(url=(root / "bucket").as_uri())
    sampler: Any = CannedSampler(spec, tokens)
    async with open_scorer(spec.reward) as scorer:
        rollout = Rollout(plan, sampler, scorer, store)
        await overlap([rollout.carry(number) for number in range(len(plan.parts))])
        manifest = rollout.manifest(is_complete=True)
    if manifest.summary.sample_count != problems * samples:
        raise SystemExit(f"{manifest.summary.sample_count} samples were written")
    return sum(part.size_bytes for part in manifest.parts)


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=12_500)
    parser.add_argument("--samples", type=int, default=8, help="per problem")
    parser.add_argument("--tokens", type=int, default=1000, help="per sample")
    options = parser.parse_args()
    total = options.problems * options.samples
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        with watched() as seen:
            size_bytes = asyncio.run(
                roll_out(root, options.problems, options.samples, options.tokens)
            )
    start = seen[0][1]
    tenth = max(1, len(seen) // 10)
    peaks = [
        max(rss for _, rss in seen[at : at + tenth]) - start for at in range(0, len(seen), tenth)
    ]
    print("peak above start in each tenth of the run, MiB:")
    print("  " + "  ".join(f"{peak / (1 << 20):.0f}" for peak in peaks))
    print(
        f"rollout memory, {total} samples x {options.tokens} tokens in {seen[-1][0]:.0f} s, "
        f"{size_bytes / 1e6:.0f} MB of Parquet: {max(peaks) / (1 << 20):.0f} MiB above start "
        f"(bar {BAR_MIB})"
    )


if __name__ == "__main__":
    main()
