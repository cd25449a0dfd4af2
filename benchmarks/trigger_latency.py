"""How long a trainer waits: from its POST to the flow's first line, and to the end of the cycle.

Tiny weights, instant replicas, a Prefect server on SQLite, and `python -m flows.serve`; with
`--worker` a process worker instead, which starts a Python for every cycle.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.processes import emulator, prefect_server

CYCLES = 6
BAR_STARTED_SECONDS, BAR_ENDED_SECONDS = 3.0, 5.0
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--engine", "stub"]
FLEET += ["--account", "bench", "--model", "tiny", "--deployment", "fleet"]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def main() -> None:
    """Run the benchmark and print both figures."""
    parser = argparse.ArgumentParser(description="From a trainer's POST to a cycle's end.")
    parser.add_argument("--worker", action="store_true", help="a process worker, as deployed")
    has_worker = parser.parse_args().worker
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        with prefect_server(root / "prefect") as api:
            from examples.five_cycles import declare_blocks, spec_of, write_checkpoints
            from hotload.options import RewardSpec

            checkpoints = write_checkpoints(root / "checkpoints", CYCLES)
            bucket = (root / "bucket").as_uri()
            fleet = emulator(bucket, checkpoints[0], root / "emulator.log", FLEET)
            with fleet as service, waiting(root, has_worker=has_worker):
                asyncio.run(declare_blocks(service, bucket, NAMES))
                update: dict[str, Any] = {"reward": RewardSpec()}
                declared = [
                    spec_of(root, checkpoints, version).model_copy(update=update)
                    for version in range(1, CYCLES + 1)
                ]
                name = "checkpoint-to-rollout/" + ("process" if has_worker else "served")
                taken = [trigger(api, name, spec.model_dump(mode="json")) for spec in declared]
    started, ended = ([one[place] for one in taken[1:]] for place in (0, 1))
    for what, seconds, bar in (
        ("the flow's first line", started, BAR_STARTED_SECONDS),
        ("Completed", ended, BAR_ENDED_SECONDS),
    ):
        print(
            f"from the POST to {what}: median {statistics.median(seconds):.2f} s, at most "
            f"{max(seconds):.2f} s in {len(seconds)} deltas (bar {bar:.0f} s)"
        )


@contextmanager
def waiting(root: Path, *, has_worker: bool) -> Iterator[None]:
    """What runs the cycles, ready."""
    command = ["-m", "flows.serve"]
    if has_worker:
        subprocess.run(["make", "-o", "install", "deploy", f"PY={sys.executable}"], check=True)
        command = ["-m", "prefect", "worker", "start", "--pool", "hotload-process"]
    with (root / "runner.log").open("wb") as log:
        child = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def trigger(api: str, deployment: str, spec: dict[str, Any]) -> tuple[float, float]:
    """Seconds from the POST until the cycle runs, and until it has ended well."""
    import httpx

    with httpx.Client(base_url=api, timeout=60) as http:
        name = f"/deployments/name/{deployment}"
        found = ask(lambda: http.get(name), lambda answer: answer.status_code != 404)
        posted = time.time()
        path = f"/deployments/{found.json()['id']}/create_flow_run"
        body = {"parameters": {"spec": spec}, "idempotency_key": f"{spec['policy_version']}"}
        # 503 says that another has locked the SQLite file.
        made = ask(lambda: http.post(path, json=body), lambda answer: answer.status_code != 503)
        run_path = f"/flow_runs/{made.raise_for_status().json()['id']}"
        run = ask(
            lambda: http.get(run_path).raise_for_status().json(),
            lambda answer: answer.get("state_type") in ENDED,
        )
        if run["state_type"] != "COMPLETED":
            raise SystemExit(f"{run['state_name']}: {run['state']['message']}")
        states = http.get("/flow_run_states/", params={"flow_run_id": run["id"]}).json()
    at = {state["name"]: moment(state["timestamp"]) for state in states}
    return at["Running"] - posted, at["Completed"] - posted


def ask(question: Callable[[], Any], is_answer: Callable[[Any], bool]) -> Any:
    """Ask the server until its answer will do; give up after five minutes."""
    deadline = time.monotonic() + 300
    while not is_answer(answer := question()):
        if time.monotonic() > deadline:
            raise SystemExit(f"the Prefect server says the same for 300 s: {answer}")
        time.sleep(0.05)
    return answer


def moment(text: str) -> float:
    """Seconds since 1970 of a time that the server names."""
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
