"""Send metrics: a cycle's numbers to Prometheus and Weights & Biases, where the spec names them.

Neither may fail a cycle (design, rule 7): what goes wrong is logged, and the numbers lie in the
store.
"""

import asyncio
import importlib
from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger

from hotload.local import write_atomic
from hotload.metrics import prometheus_text
from hotload.report import CycleReport
from hotload.spec import CycleSpec

WANDB_SECONDS = 120.0


async def send_metrics(spec: CycleSpec, report: CycleReport, metrics: Mapping[str, float]) -> None:
    """Replace the Prometheus file and log one step at Weights & Biases, as far as declared."""
    logger = get_run_logger()
    if spec.prometheus_file is not None:
        numbers = {**metrics, "policy_version": report.policy_version}
        text = prometheus_text(numbers, {"run": spec.run_id})
        try:
            await asyncio.to_thread(write_atomic, Path(spec.prometheus_file), text.encode())
        except OSError as error:
            logger.warning("the Prometheus file was not written: %s", error)
    if spec.wandb.entity is not None:
        try:
            async with asyncio.timeout(WANDB_SECONDS):
                await asyncio.to_thread(_log_to_wandb, spec, dict(metrics))
        except ModuleNotFoundError:
            logger.warning("the package wandb is not installed here: no run gets these metrics")
        except Exception as error:  # noqa: BLE001 - its client raises anything; best effort is named
            logger.warning("Weights & Biases did not take the metrics: %s", type(error).__name__)


def _log_to_wandb(spec: CycleSpec, metrics: dict[str, float]) -> None:
    """Log one step of the run that has the run id for its own, so that every cycle continues it."""
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        entity=spec.wandb.entity,
        project=spec.wandb.project,
        name=spec.wandb.run_name or spec.run_id,
        id=spec.run_id,
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.log(metrics, step=spec.policy_version)
    run.finish()
