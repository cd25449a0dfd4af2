"""One step a module, with its retries and its cached result; a task calls no other task.

The one retry rule lies here, because every task carries it: what may pass is tried again,
everything else stops. protocol §4 and §13: 2^n seconds, capped at 30, about 300 seconds in all.
Every delay varies by up to 30 %, so that tasks which failed together do not come back together.
"""

from typing import Any

from prefect.client.schemas.objects import State, TaskRun

from hotload.errors import ServiceUnavailableError, StoreUnavailableError

__all__ = [
    "announce",
    "baseline",
    "conclude",
    "encode",
    "nodes",
    "plan",
    "preflight",
    "probe",
    "publication",
    "retain",
    "roll_out",
    "show",
    "training",
    "upload",
    "validate",
    "wait",
]

TRANSIENT = (ServiceUnavailableError, StoreUnavailableError)
DELAYS_SECONDS = [2.0, 4.0, 8.0, 16.0] + [30.0] * 9


async def is_transient(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Tell whether the failed attempt behind `state` may succeed when repeated."""
    try:
        await state.aresult()
    except TRANSIENT:
        return True
    except Exception:  # noqa: BLE001 - the answer is "no", the error itself goes its own way
        return False
    return False


RETRIED: dict[str, Any] = {
    "retries": len(DELAYS_SECONDS),
    "retry_delay_seconds": DELAYS_SECONDS,
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": is_transient,
}
