"""Fan-out: wall time of the rollout flow over the same requests sent by a hand-written loop.

1,000 problems × 4 samples, 128 in flight, against a stub engine of fixed latency in its own
process, under a real Prefect server. Both sides use the same transport, the same concurrency and
the same streaming parse; the flow also scores, writes Parquet and reports to Prefect. Run from the
root: `python -m benchmarks.fan_out`.
"""

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BAR = 1.3
IDENTITY = "bench-000001-00000000"
START_SECONDS = 120


@contextmanager
def process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, text=True, **options) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def prefect_server(home: Path) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
        "DO_NOT_TRACK": "1",
        "FIREWORKS_API_KEY": "bench",
    }
    command = ("-m", "prefect", "server", "start", "--no-ui", "--host", "127.0.0.1", "--port")
    with process(
        sys.executable, *command, str(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ):
        for _ in range(10 * START_SECONDS):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise SystemExit("the Prefect server did not start")
        yield


@contextmanager
def stub(latency: float, token_count: int) -> Iterator[str]:
    command = ("-m", "benchmarks.stub_server", "--latency", str(latency), "--tokens")
    with process(sys.executable, *command, str(token_count), stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        yield running.stdout.readline().strip()


async def hand_written(url: str, spec: Any, problems: Any, in_flight: int) -> int:
    """The least a careful person writes: a semaphore, a stream, a parse."""
    import httpx
    import orjson
    from httpx_aiohttp import AiohttpTransport

    from hotload.wire.fireworks import COMPLETIONS_PATH, DEPLOYMENT_HEADER, MODEL_HEADER
    from hotload.wire.inference import DONE, Answer, EventStream, sample_body

    gate = asyncio.Semaphore(in_flight)
    headers = {
        "Authorization": "Bearer bench",
        MODEL_HEADER: "accounts/local/models/policy",
        DEPLOYMENT_HEADER: "accounts/local/deployments/rollouts",
    }
    transport = AiohttpTransport(limits=httpx.Limits(max_connections=256))
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=600, transport=transport
    ) as http:

        async def sample(problem: Any, number: int) -> int:
            body = sample_body(
                problem, spec.sampling, model="accounts/local/models/policy", seed=number
            )
            answer, events = Answer(spec.sampling, None), EventStream()
            async with (
                gate,
                http.stream(
                    "POST",
                    COMPLETIONS_PATH,
                    content=orjson.dumps(body),
                    headers={"Content-Type": "application/json"},
                ) as response,
            ):
                async for piece in response.aiter_bytes():
                    for _, data in events.feed(piece):
                        if data != DONE:
                            answer.add(orjson.loads(data))
            assert answer.finish() is None
            return len(answer.token_ids)

        group = spec.sampling.completions_per_prompt
        counts = await asyncio.gather(
            *(sample(problem, number) for problem in problems for number in range(group))
        )
    return sum(counts)


async def measure(options: argparse.Namespace, url: str, work: Path) -> float:
    from blocks.checkpoint_store import CheckpointStore
    from blocks.rollout_client import RolloutClient
    from flows.rollouts import roll_out_and_score
    from hotload.spec import CycleSpec
    from tasks.read_problems import read_problems

    dataset = work / "problems.jsonl"
    rows = (
        {"id": i, "prompt": f"problem {i}: say ab", "answer": "ab"} for i in range(options.problems)
    )
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "store").mkdir()
    names = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
    await RolloutClient(base_url=url, **names).save("bench", overwrite=True)
    await CheckpointStore(url=f"file://{work}/store").save("bench", overwrite=True)

    def spec_of(version: int) -> CycleSpec:
        return CycleSpec.model_validate(
            {
                "checkpoint": str(work),
                "work_dir": str(work),
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

    problems = read_problems(str(dataset))
    ratios = []
    for turn in range(options.turns):
        start, cpu = time.perf_counter(), cpu_seconds()
        tokens = await hand_written(url, spec_of(1), problems, options.in_flight)
        by_hand, by_hand_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        start, cpu = time.perf_counter(), cpu_seconds()
        summary = await roll_out_and_score(spec_of(turn), IDENTITY)
        by_flow, by_flow_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        assert summary.completion_token_count == tokens, summary
        assert not summary.failed_samples, summary
        ratios.append(by_flow / by_hand)
        print(
            f"turn {turn + 1}: by hand {by_hand:.2f} s ({by_hand_cpu:.2f} s CPU), "
            f"flow {by_flow:.2f} s ({by_flow_cpu:.2f} s CPU), ratio {ratios[-1]:.2f}"
        )
    return statistics.median(ratios)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=128)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds per answer")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as work,
        stub(options.latency, options.tokens) as url,
        prefect_server(Path(work) / "prefect"),
    ):
        ratio = asyncio.run(measure(options, url, Path(work)))
    print(
        f"fan-out: {options.problems} x {options.samples}, {options.in_flight} in flight, "
        f"{options.latency:g} s latency: flow / hand-written loop = {ratio:.2f} (bar {BAR})"
    )
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
