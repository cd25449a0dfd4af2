"""Send metrics: the numbers of a cycle, or of a training run's steps, to Prometheus and Weights &
Biases, where the spec names them.

Neither may fail a cycle (design, rule 7): what goes wrong is for the caller to log, and the numbers
lie in the store.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hotload.directory.files import write_atomic
from hotload.report.cycle_report import CycleReport
from hotload.report.metrics import prometheus_text
from hotload.spec import CycleSpec

WANDB_SECONDS = 120.0
NOT_TAKEN = "Weights & Biases did not take the metrics"


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
    if log := await open_wandb(spec, str(spec.line or ""), f"line {spec.line}"):
        await log.log(metrics, spec.policy_version)
        problems += filter(None, [await log.close()])
    return problems


class WandbLog:
    """A run at Weights & Biases while a process of its own logs steps there."""

    def __init__(self, child: Process) -> None:
        self._child = child
        self._is_closed = False

    async def log(self, metrics: Mapping[str, float], step: int) -> str | None:
        """Hand on the numbers of a step, and wait for nobody; returns what has gone wrong, once."""
        if self._child.returncode is not None:
            return await self.close()
        self._send({"metrics": dict(metrics), "step": step})
        return None

    async def close(self) -> str | None:
        """Let the process come to its end, or end it; returns what went wrong, if something did."""
        if self._is_closed:
            return None
        self._is_closed = True
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            async with asyncio.timeout(WANDB_SECONDS):
                wrong = await self._child.stdout.read()
                await self._child.wait()
        except TimeoutError:
            return f"{NOT_TAKEN}: not done in {WANDB_SECONDS:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # with what its client started
            await self._child.wait()
        if self._child.returncode == 0:
            return None
        return f"{NOT_TAKEN}: {wrong.decode(errors='replace')[:80].strip()}"

    def _send(self, document: Mapping[str, object]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(document).encode() + b"\n")


async def open_wandb(spec: CycleSpec, part: str = "", name: str = "") -> WandbLog | None:
    """Begin to log at the run that a cycle declares, or at one beside it for a `part` that counts
    steps of its own, since they only grow there; None where none is declared."""
    named = spec.wandb
    if named.entity is None:
        return None
    run = {
        "entity": named.entity,
        "project": named.project,
        "name": named.run_name or spec.run_id,
        "id": spec.run_id,
    }
    if part:
        # No run id has a tilde.
        run |= {"name": f"{run['name']}, {name or part}", "id": f"{spec.run_id}~{part}"}
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
    log = WandbLog(child)
    log._send(run)
    return log
