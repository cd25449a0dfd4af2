"""Fan-out: wall time of the rollout flow over the same calls without Prefect, and over the same
requests sent by a hand-written loop.

2,000 groups of 4 samples, 128 in flight, against the emulator's stub engine of fixed latency, in
its own process, under a real Prefect server. All sides use aiohttp, the same concurrency and the
same streaming parse. The loop by hand does nothing else. The flow also scores, writes Parquet and
reports to Prefect; the same calls without Prefect do all but the last. Bars: at most 1.1 times
those calls, at most 1.3 times the loop.
"""

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from examples.processes import emulator, prefect_server

BAR, LOOP_BAR = 1.1, 1.3
IDENTITY = "bench-000001-00000000"
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--engine", "stub"]
FLEET += ["--account", "bench", "--model", "tiny", "--deployment", "fleet"]


async def by_hand(url: str, spec: Any, problems: Any) -> int:
    """The least a careful person writes: a semaphore, a stream, a parse. Completion tokens."""
    import aiohttp
    import orjson

    from hotload.publish import fireworks_names
    from hotload.rollout import completions_api
    from hotload.rollout.engines.fireworks import sample_body
    from hotload.rollout.request import first_request

    gate = asyncio.Semaphore(spec.sampling.concurrency.initial_window)
    model = fireworks_names.model_name(NAMES["account_id"], NAMES["model_id"])
    service = fireworks_names.deployment_name(NAMES["account_id"], NAMES["deployment_id"])
    headers = {
        "Authorization": "Bearer bench",
        "Content-Type": "application/json",
        fireworks_names.MODEL_HEADER: model,
        fireworks_names.DEPLOYMENT_HEADER: service,
    }
    connector = aiohttp.TCPConnector(limit=256)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def sample(problem: Any, number: int) -> int:
            sampling = spec.sampling
            request = first_request(
                problem, number, sampling=sampling, identity=IDENTITY, policy_version=0
            )
            content = orjson.dumps(sample_body(request, model))
            answer, events = completions_api.Answer(sampling, None), completions_api.EventStream()
            target = url + fireworks_names.COMPLETIONS_PATH
            async with gate, session.post(target, data=content) as response:
                async for piece in response.content.iter_any():
                    for _, data in events.feed(piece):
                        if data != completions_api.DONE:
                            answer.add(orjson.loads(data))
            assert answer.finish() is None
            return len(answer.token_ids)

        group = range(spec.sampling.completions_per_prompt)
        samples = (sample(problem, number) for problem in problems for number in group)
        return sum(await asyncio.gather(*samples))


async def without_prefect(spec: Any, url: str, root: Path) -> Any:
    """What the flow does, called as plain functions; the summary."""
    from prefect.logging import disable_run_logger

    from hotload.clients.access import Access
    from hotload.clients.inference.client import InferenceClient
    from hotload.clients.store import Store
    from hotload.concurrently import overlap
    from hotload.dataset.rollout_plan import MANIFEST_FILE
    from hotload.sampling.problems import plan_rollouts
    from hotload.sampling.rollout import SampledService, open_rollout
    from tasks.roll_out import hand_back

    client = InferenceClient(Access(base_url=url, api_key="bench", **NAMES))
    store = Store(url=(root / "bucket").as_uri())
    plan = await plan_rollouts(spec, IDENTITY)
    with disable_run_logger():
        async with open_rollout(spec, plan, SampledService(client, IDENTITY), store) as rollout:
            await overlap(rollout.carry(number) for number in range(len(plan.parts)))
            manifest = rollout.manifest(is_complete=True)
        return await hand_back.fn(store, manifest, plan.path(MANIFEST_FILE))


async def measure(options: argparse.Namespace, url: str, root: Path) -> tuple[float, float]:
    """The median ratios over the turns: to the plain calls, to the loop."""
    from prefect import flow

    from flows.sampling import roll_out
    from hotload.clients.access import Access
    from hotload.clients.inference.client import InferenceClient
    from hotload.clients.store import Store
    from hotload.sampling.problems import read_problems
    from hotload.sampling.rollout import SampledService
    from hotload.spec import CycleSpec

    dataset = root / "problems.jsonl"
    rows = ({"id": i, "prompt": f"{i}: say ab", "answer": "ab"} for i in range(options.problems))
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = InferenceClient(Access(base_url=url, api_key="bench", **NAMES))
    store = Store(url=(root / "bucket").as_uri())

    @flow(name="roll-out")
    async def with_prefect(spec: CycleSpec) -> Any:
        return await roll_out(spec, [SampledService(client, IDENTITY)], store)

    def spec_of(version: int) -> CycleSpec:
        return CycleSpec.model_validate(
            {
                "checkpoint": str(root),
                "work_dir": str(root),
                "run_id": "bench",
                "policy_version": version,
                "rollouts": "bench",
                "store": "bench",
                "problems": {"dataset": str(dataset)},
                "readiness": {"warmup_after_hotload": False},
                "sampling": {
                    "completions_per_prompt": options.samples,
                    "max_completion_tokens": options.tokens,
                    "concurrency": {"mode": "fixed", "initial_window": options.in_flight},
                },
                "reward": {"name": "contains"},
            }
        )

    async def timed(work: Awaitable[Any]) -> tuple[Any, float, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        result = await work
        wall = time.perf_counter() - start
        now = resource.getrusage(resource.RUSAGE_SELF)
        return result, wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime

    problems = read_problems(str(dataset))
    ratios, loop_ratios = [], []
    names = ("loop", "without Prefect", "flow")
    print("  turn" + "".join(f"{name:>21}" for name in names) + "  ratio  to loop")
    for turn in range(options.turns):
        spec = spec_of(2 * turn)
        loop = await timed(by_hand(url, spec, problems))
        plain = await timed(without_prefect(spec_of(2 * turn + 1), url, root))
        sampled = await timed(with_prefect(spec))
        tokens = (plain[0].completion_token_count, sampled[0].completion_token_count)
        if sampled[0].failed_samples or set(tokens) != {loop[0]}:
            raise SystemExit(f"the sides did not do the same work: {loop[0]}, {sampled[0]}")
        ratios.append(sampled[1] / plain[1])
        loop_ratios.append(sampled[1] / loop[1])
        sides = [f"{wall:8.2f} s {cpu:5.2f} CPU" for _, wall, cpu in (loop, plain, sampled)]
        told = "".join(f"{side:>21}" for side in sides)
        print(f"{turn + 1:6}{told} {ratios[-1]:6.2f} {loop_ratios[-1]:8.2f}", flush=True)
    return statistics.median(ratios), statistics.median(loop_ratios)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="The rollout flow against hand-written loops.")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=4, help="per problem")
    parser.add_argument("--in-flight", type=int, default=128)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds to the first token")
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        with prefect_server(root / "prefect"):
            from examples.tiny_trainer import TinyTrainer

            TinyTrainer().save(root / "base")
            fleet = [*FLEET, "--latency-seconds", str(options.latency)]
            bucket = (root / "bucket").as_uri()
            with emulator(bucket, root / "base", root / "emulator.log", fleet) as url:
                ratio, loop_ratio = asyncio.run(measure(options, url, root))
    what = f"{options.problems} x {options.samples} samples, {options.in_flight} in flight"
    print(
        f"fan-out, {what}, {options.latency:g} s latency: {ratio:.2f} of the same calls without "
        f"Prefect (bar {BAR}), {loop_ratio:.2f} of the loop (bar {LOOP_BAR})"
    )


if __name__ == "__main__":
    main()
