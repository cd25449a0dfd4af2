"""Send metrics: a cycle's numbers to Prometheus and Weights & Biases, where the spec names them.

Neither may fail a cycle (design, rule 7): what goes wrong is for the caller to log, and the numbers
lie in the store.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from hotload.directory.files import write_atomic
from hotload.report.cycle_report import CycleReport
from hotload.report.metrics import prometheus_text
from hotload.spec import CycleSpec

WANDB_SECONDS = 120.0


async def send_metrics(
    spec: CycleSpec, report: CycleReport, metrics: Mapping[str, float]
) -> list[str]:
    """Replace the Prometheus file and log one step at Weights & Biases, as far as declared.

    Returns what went wrong, a sentence each.
    """
    problems = []
    if spec.prometheus_file is not None:
        numbers = {**metrics, "policy_version": report.policy_version, "line": report.line}
        text = prometheus_text(numbers, {"run": spec.run_id})
        try:
            await asyncio.to_thread(write_atomic, Path(spec.prometheus_file), text.encode())
        except OSError as error:
            problems.append(f"the Prometheus file was not written: {error}")
    if spec.wandb.entity is not None and (wrong := await _log_to_wandb(spec, metrics)):
        problems.append(f"Weights & Biases did not take the metrics: {wrong}")
    return problems


async def _log_to_wandb(spec: CycleSpec, metrics: Mapping[str, float]) -> str | None:
    """Have a process of its own log one step; what went wrong, if something did."""
    if find_spec("wandb") is None:
        return "the package wandb is not installed here"
    named = spec.wandb
    run = {
        "entity": named.entity,
        "project": named.project,
        "name": named.run_name or spec.run_id,
        "id": spec.run_id,
    }
    if spec.line:
        # Steps only grow there: a line is a run of its own, beside the one it left. No run id has
        # a tilde.
        run |= {"name": f"{run['name']}, line {spec.line}", "id": f"{spec.run_id}~{spec.line}"}
    step = {"run": run, "metrics": dict(metrics), "step": spec.policy_version}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hotload.clients.metrics.wandb_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(WANDB_SECONDS):
            wrong, _ = await child.communicate(json.dumps(step).encode())
    except TimeoutError:
        return f"not done in {WANDB_SECONDS:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what its client started
        await child.wait()
    return None if child.returncode == 0 else wrong.decode(errors="replace")[:80].strip()
