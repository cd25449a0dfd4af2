"""Faults a test or a person can order, by a YAML plan or `POST /emulator/faults` (protocol §21).

A fault is an object `{"fault": NAME, ...}`. Every fault takes `count` (how often it strikes;
without it always), `after` (how many chances it lets pass first), `replica` (`replica-0`, or its
number) and `identity`. What else a fault takes is in FAULTS, shown by `python -m emulator --help`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

OPERATIONS = ("signal", "status", "hint", "ledger", "deployment", "inference")
SELECTORS: Mapping[str, type] = {"count": int, "after": int, "replica": str, "identity": str}


@dataclass(frozen=True, slots=True)
class FaultKind:
    """What a fault does, and its parameters with their defaults."""

    tells: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


FAULTS: Mapping[str, FaultKind] = {
    "respond": FaultKind(
        "answer an operation with this status (425, 404, 409, 429, 500, 503, ...); "
        "accepted=true carries it out first; body replaces the error body, as text/html",
        {
            "operation": "inference",
            "status": 503,
            "retry_after": None,
            "accepted": False,
            "body": None,
            "message": None,
        },
    ),
    "hang": FaultKind(
        "take the request and never answer, until the fault is removed", {"operation": "inference"}
    ),
    "disconnect": FaultKind("begin an answer and close the connection", {"operation": "inference"}),
    "truncate_stream": FaultKind(
        "end a stream without finish_reason; abrupt=true breaks the connection too",
        {"after_tokens": 1, "abrupt": False},
    ),
    "stream_error": FaultKind(
        "send an error inside a 200 stream; as_event=true as an SSE event named error",
        {"after_tokens": 1, "status": 500, "as_event": False},
    ),
    "drain_expiry": FaultKind("answer 425 as if the drain timeout had passed"),
    "empty_replicas": FaultKind("show `replicas: []` in the status"),
    "stale_error": FaultKind(
        "show stage error for another target (null: for none) in the status", {"target": None}
    ),
    "odd_stage": FaultKind("show this stage in the status", {"stage": "warming"}),
    "lagging_replica": FaultKind(
        "a replica stays at downloading for `seconds`, or until the fault is removed",
        {"seconds": None},
    ),
    "first_ready_only": FaultKind(
        "every replica but the first stays at downloading until the fault is removed"
    ),
    "slow_swap": FaultKind("the swap of weights takes longer", {"seconds": 10.0}),
    "torn_apply": FaultKind("a delta fails after its first shard was changed in place"),
    "corrupt_object": FaultKind(
        "flip a bit in each of `size` bytes of a downloaded file, from `offset` on (-1: the last)",
        {"file": "*.safetensors", "offset": -1, "size": 1},
    ),
    "missing_object": FaultKind("a file is not in the bucket", {"file": "*.safetensors"}),
    "late_object": FaultKind(
        "a file is not visible for the first `count` looks", {"file": "*.safetensors"}
    ),
    "restart_to_base": FaultKind("instead of loading, a replica restarts and serves base weights"),
    "ledger_reset": FaultKind("another party resets the ledger just before a signal"),
}


@dataclass(slots=True)
class Fault:
    """One ordered fault. `left` None means always."""

    number: int
    name: str
    parameters: dict[str, Any]
    left: int | None
    after: int
    replica: str | None
    identity: str | None
    struck: int = 0

    def render(self) -> dict[str, Any]:
        """Show the fault as `GET /emulator/faults` does."""
        return {
            "number": self.number,
            "left": self.left,
            "after": self.after,
            "replica": self.replica,
            "identity": self.identity,
            "struck": self.struck,
            **self.parameters,
        }


class InvalidFaultError(ValueError):
    """A fault that is not in FAULTS, or a parameter it does not take."""


class Faults:
    """The ordered faults. `take` may be called from any thread; orders come from the event loop."""

    def __init__(self, plan: tuple[Mapping[str, Any], ...] = ()) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._next_number = 1
        self.changed = asyncio.Event()
        for order in plan:
            self.add(order)

    def add(self, order: object) -> Fault:
        """Order one fault.

        Raises:
            InvalidFaultError: unknown name or parameter, or a value of another type.
        """
        if not isinstance(order, Mapping) or order.get("fault") not in FAULTS:
            raise InvalidFaultError(f"expected an object with `fault`, one of {', '.join(FAULTS)}")
        name = str(order["fault"])
        known = FAULTS[name].parameters
        selectors = {key: order[key] for key in SELECTORS if order.get(key) is not None}
        given = {k: v for k, v in order.items() if k not in SELECTORS and k != "fault"}
        for key, value in given.items():
            if key not in known:
                raise InvalidFaultError(
                    f"{name} takes {', '.join((*known, *SELECTORS))}, not {key}"
                )
            _check_type(name, key, value, known[key])
        for key in ("count", "after"):
            if key in selectors and (type(selectors[key]) is not int or selectors[key] < 0):
                raise InvalidFaultError(f"{name}: {key} is a count")
        parameters = {"fault": name, **known, **given}  # never empty: true where a fault strikes
        if parameters.get("operation", OPERATIONS[0]) not in OPERATIONS:
            raise InvalidFaultError(f"{name}: operation is one of {', '.join(OPERATIONS)}")
        if name == "late_object" and "count" not in selectors:
            raise InvalidFaultError("late_object: count says how many looks do not see it")
        replica = selectors.get("replica")
        if isinstance(replica, int):
            replica = f"replica-{replica}"
        fault = Fault(
            number=self._next_number,
            name=name,
            parameters=parameters,
            left=selectors.get("count"),
            after=selectors.get("after", 0),
            replica=replica,
            identity=selectors.get("identity"),
        )
        self._next_number += 1
        with self._lock:
            self._faults.append(fault)
        self.changed.set()
        return fault

    def clear(self, number: int | None = None) -> int:
        """Take back one fault, or all; returns how many there were."""
        with self._lock:
            gone = [f for f in self._faults if number in (None, f.number)]
            self._faults = [f for f in self._faults if f not in gone]
        self.changed.set()
        return len(gone)

    def render(self) -> list[dict[str, Any]]:
        """Show all ordered faults, spent ones included."""
        with self._lock:
            return [fault.render() for fault in self._faults]

    def take(self, name: str, **where: str | None) -> Mapping[str, Any] | None:
        """Take the parameters of the first fault that strikes here, which is counted; else None.

        `where` is `replica`, `identity`, `operation`, `file`; a fault strikes where it asks for
        nothing else.
        """
        if not self._faults:
            return None
        with self._lock:
            for fault in self._faults:
                if fault.left == 0 or not _matches(fault, name, where):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.struck += 1
                if fault.left is not None:
                    fault.left -= 1
                return fault.parameters
        return None

    def peek(self, name: str, **where: str | None) -> Mapping[str, Any] | None:
        """Look as `take` does, with nothing counted."""
        with self._lock:
            for fault in self._faults:
                if fault.left != 0 and not fault.after and _matches(fault, name, where):
                    return fault.parameters
        return None

    def holds(self, parameters: Mapping[str, Any]) -> bool:
        """Tell whether the fault that `take` gave has not been taken back."""
        with self._lock:
            return any(fault.parameters is parameters for fault in self._faults)


def read_plan(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Read the faults of a YAML plan: a list of fault objects, alone or under `faults`.

    Raises:
        InvalidFaultError: not YAML, or not of this form.
    """
    try:
        plan = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidFaultError(f"{path.name} is not YAML: {error}") from None
    if isinstance(plan, dict):
        plan = plan.get("faults")
    if not isinstance(plan, list):
        raise InvalidFaultError(f"{path.name}: expected a list of faults")
    for order in plan:
        Faults().add(order)
    return tuple(plan)


def _matches(fault: Fault, name: str, where: Mapping[str, str | None]) -> bool:
    if fault.name != name:
        return False
    for key in ("replica", "identity"):
        wanted = getattr(fault, key)
        if wanted is not None and wanted != where.get(key):
            return False
    if "operation" in fault.parameters and fault.parameters["operation"] != where.get("operation"):
        return False
    pattern = fault.parameters.get("file")
    return pattern is None or fnmatchcase(where.get("file") or "", pattern)


def _check_type(name: str, key: str, value: object, default: object) -> None:
    """A default of None allows any plain value; a number may be whole."""
    if default is None:
        fits = value is None or isinstance(value, (str, int, float))
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = type(value) is type(default)
    if not fits:
        raise InvalidFaultError(f"{name}: {key} cannot be {value!r}")
