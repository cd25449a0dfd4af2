"""Errors of hotload. The class says who must act next.

HotLoadError
├── InvalidCheckpointError (ValueError)       trainer: write the checkpoint again; we stop
├── InvalidIdentityError (ValueError)         caller: choose another run, version or name; we stop
│   └── IdentityConflictError                   the name is taken by other content
├── InvalidProblemsError (ValueError)         caller: mend the problem file; we stop
├── InvalidInputError (ValueError)            caller, trainer: mend several of these; we stop
├── DeltaError (ValueError)                   the bytes are not the delta they claim; we stop
│   └── ChecksumMismatchError                   a tensor is not what its checksum says
├── NeedsFullSnapshotError                    flow: publish a full snapshot; all that a flow catches
│   ├── LayoutMismatchError                     keys, dtype, shape, shard map or side files changed
│   ├── ChainBrokenError                        the service is not on `previous`
│   ├── BaselineLostError                       the base is gone and cannot be rebuilt
│   ├── SelfCheckError                          our delta does not decode to its target
│   ├── LoadFailedError                         a replica reports an error for our identity
│   └── ReadinessTimeoutError (TimeoutError)    replicas did not converge in time
├── RolloutsFailedError                       operator: no sample of a part got an answer; we stop
├── FullSnapshotFailedError                   operator: fulls failed too; look at the replicas
├── ServicesFailedError                       operator: too few services serve it; look at those
├── LeaseLostError                            nobody: another holds it, or it ran out; we stop
├── RewardError                               caller: mend the reward, or its service's key; we stop
├── RolloutFunctionError                      caller: the rollout function cannot be used; we stop
├── TrainerError                              caller: the trainer cannot be used; we stop
├── StoreError (OSError)                      operator: bucket, path or rights are wrong; we stop
│   └── StoreUnavailableError                   task: retry
└── ServiceError                              carries status_code and the head of the body
    ├── ServiceUnavailableError                 task: retry
    ├── ServiceRefusedError                     operator: key, names or billing are wrong; we stop
    ├── SnapshotRejectedError                   caller: files or content refused, under any name
    └── ProtocolError                           provider: broke the wire format; we stop

Operands are positional, plain and few, so that every error survives pickling; the sentence is made
late.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule: where, what was found, what was expected, and who must act."""

    rule: str
    file: str
    tensor: str | None
    found: str
    expected: str
    who: str = "trainer"
    severity: Severity = "error"

    @property
    def where(self) -> str:
        """The file, and the tensor in it where the rule is about one."""
        return self.file if self.tensor is None else f"{self.file}, tensor {shorten(self.tensor)}"

    @property
    def summary(self) -> str:
        """The rule, what was found and what was expected."""
        return f"{self.rule}: found {self.found}, expected {self.expected}"

    def __str__(self) -> str:
        return f"{self.where}: {self.summary} [{self.severity}, {self.who} acts]"


def shorten(value: object) -> str:
    """Show a value to a person: its repr, at most 160 characters."""
    text = ascii(value[:200] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 160 else f"{text[:157]}…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask for the known name that is close to a misspelt one; empty if none is."""
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean `{close[0]}`?" if close else ""


class HotLoadError(Exception):
    """Any error hotload raises on purpose."""


class InvalidCheckpointError(HotLoadError, ValueError):
    """The checkpoint breaks a layout rule; the findings say where, what and who must act."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__(findings)
        self.findings = findings

    def __str__(self) -> str:
        shown = "\n".join(f"  {finding}" for finding in self.findings[:20])
        more = f"\n  … and {len(self.findings) - 20} more" if len(self.findings) > 20 else ""
        plural = "" if len(self.findings) == 1 else "s"
        return f"checkpoint refused, {len(self.findings)} finding{plural}:\n{shown}{more}"


class InvalidIdentityError(HotLoadError, ValueError):
    """A name cannot serve as an identity."""

    def __init__(self, identity: str, reason: str) -> None:
        super().__init__(identity, reason)
        self.identity, self.reason = identity, reason

    def __str__(self) -> str:
        return f"identity {self.identity[:160]!r} refused: {self.reason}"


class IdentityConflictError(InvalidIdentityError):
    """The same run and policy version was published before with other content."""


class InvalidProblemsError(HotLoadError, ValueError):
    """The problem file is empty or has a malformed row."""

    def __init__(self, source: str, row: int, reason: str) -> None:
        super().__init__(source, row, reason)
        self.source, self.row, self.reason = source, row, reason

    def __str__(self) -> str:
        where = f"{self.source}, row {self.row}" if self.row else self.source
        return f"problems refused: {where}: {self.reason}"


class InvalidInputError(HotLoadError, ValueError):
    """Several things that a cycle was given cannot be used: checkpoint, problems, reward, …"""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def raise_together(errors: Sequence[HotLoadError]) -> None:
    """Raise errors as one that tells each once; the error itself where there is one, none for none.

    Raises:
        HotLoadError: of several, InvalidInputError.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        parts = (getattr(error, "reasons", (str(error),)) for error in errors)
        raise InvalidInputError(tuple(reason for part in parts for reason in part))


class DeltaError(HotLoadError, ValueError):
    """Bytes are not a delta that can be applied here."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject, self.reason = subject, reason

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class ChecksumMismatchError(DeltaError):
    """A decoded tensor has another checksum than the delta declares."""

    def __init__(self, subject: str, expected: str, found: str) -> None:
        HotLoadError.__init__(self, subject, expected, found)
        self.subject, self.expected, self.found = subject, expected, found
        self.reason = f"checksum is {found}, expected {expected}"


class NeedsFullSnapshotError(HotLoadError):
    """A delta cannot or may not be used; a full snapshot under a new identity can."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class LayoutMismatchError(NeedsFullSnapshotError):
    """Target and base differ in more than tensor values."""


class ChainBrokenError(NeedsFullSnapshotError):
    """The service serves another identity than the one the delta follows."""

    def __init__(self, previous: str, served: str) -> None:
        HotLoadError.__init__(self, previous, served)
        self.previous, self.served = previous, served
        self.reason = f"delta follows {previous!r}, service serves {served}"


class BaselineLostError(NeedsFullSnapshotError):
    """The served snapshot's bytes are neither on this machine nor rebuildable from the store."""

    def __init__(self, identity: str, detail: str) -> None:
        HotLoadError.__init__(self, identity, detail)
        self.identity, self.detail = identity, detail
        self.reason = f"baseline {identity!r} is lost: {detail}"


class SelfCheckError(NeedsFullSnapshotError):
    """A delta of ours does not restore its target; it never left this machine."""

    def __init__(self, file: str, detail: str) -> None:
        HotLoadError.__init__(self, file, detail)
        self.file, self.detail = file, detail
        self.reason = f"the delta of {file!r} failed its own check: {detail}"


class LoadFailedError(NeedsFullSnapshotError):
    """The service refused the snapshot, or a replica reports an error for it."""

    def __init__(self, identity: str, detail: str) -> None:
        HotLoadError.__init__(self, identity, detail)
        self.identity, self.detail = identity, detail
        self.reason = f"load of {identity!r} failed: {detail}"


class ReadinessTimeoutError(NeedsFullSnapshotError, TimeoutError):
    """Replicas did not converge on an identity before the deadline."""

    def __init__(self, identity: str, detail: str) -> None:
        HotLoadError.__init__(self, identity, detail)
        self.identity, self.detail = identity, detail
        self.reason = f"{identity!r} is not served in time: {detail}"


class FullSnapshotFailedError(HotLoadError):
    """The last rung of the fallback ladder failed."""

    def __init__(self, identity: str, detail: str) -> None:
        super().__init__(identity, detail)
        self.identity, self.detail = identity, detail

    def __str__(self) -> str:
        look = "look at the replicas: `hotload service status` says what is next"
        return f"full snapshot {self.identity!r} failed: {self.detail}; {look}"


class ServicesFailedError(HotLoadError):
    """Too few of a cycle's services serve its snapshot; `failures` says which do not, and why."""

    def __init__(self, name: str, expected: str, failures: str) -> None:
        super().__init__(name, expected, failures)
        self.name, self.expected, self.failures = name, expected, failures

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}; failed: {self.failures}; look at those"


class RolloutsFailedError(HotLoadError):
    """No sample of a part succeeded, or a service failed group after group, the model's or the
    reward's; what is missing is not recorded, so that the cycle can be run again.

    `causes` counts what is missing by cause; `example` is what one of them met.
    """

    def __init__(self, identity: str, causes: str, example: str) -> None:
        super().__init__(identity, causes, example)
        self.identity, self.causes, self.example = identity, causes, example

    def __str__(self) -> str:
        missing = f"samples from {self.identity!r} are missing: {self.causes}"
        met = f" ({self.example})" if self.example else ""
        return f"{missing}{met}; once the service answers, start the cycle again: it goes on"


class LeaseLostError(HotLoadError):
    """A lease is lost, the publisher's or a consumer's on rollouts: to `holder`, or to time where
    that is None."""

    def __init__(self, holder: str | None, detail: str) -> None:
        super().__init__(holder, detail)
        self.holder, self.detail = holder, detail

    def __str__(self) -> str:
        state = "lost" if self.holder is None else f"held by {self.holder!r}"
        return f"the lease is {state}: {self.detail}"


class RewardError(HotLoadError):
    """A reward cannot be imported, does not have the expected form, or its service refuses us."""

    def __init__(self, reward: str, reason: str) -> None:
        super().__init__(reward, reason)
        self.reward, self.reason = reward, reason

    def __str__(self) -> str:
        return f"reward {self.reward!r}: {self.reason}"


class RolloutFunctionError(HotLoadError):
    """A rollout function cannot be imported or does not have the expected form."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"rollout function {self.name!r}: {self.reason}"


class TrainerError(HotLoadError):
    """The trainer of this name cannot be used, or did not keep to what a trainer is."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"trainer {self.name!r}: {self.reason}"


class StoreError(HotLoadError, OSError):
    """The object store refused an operation for good."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class StoreUnavailableError(StoreError):
    """The object store failed in a way that may pass."""


class ServiceError(HotLoadError):
    """The hot-load service answered with an error, or not at all (`status_code` None).

    `advice` says which block it is about and what to do; empty where `detail` says that itself.
    """

    def __init__(
        self, operation: str, status_code: int | None, detail: str, advice: str = ""
    ) -> None:
        super().__init__(operation, status_code, detail, advice)
        self.operation, self.status_code, self.detail = operation, status_code, detail
        self.advice = advice

    @property
    def answer(self) -> str:
        """What was asked and what came back, without the advice."""
        status = "" if self.status_code is None else f"HTTP {self.status_code}: "
        return f"{self.operation}: {status}{self.detail}"

    def __str__(self) -> str:
        return f"{self.answer}. {self.advice}" if self.advice else self.answer


class ServiceUnavailableError(ServiceError):
    """408, 429, 5xx or a transport error: the same call may succeed later."""


class ServiceRefusedError(ServiceError):
    """401, 402, 403 or 404: key, names or billing are wrong."""


class SnapshotRejectedError(ServiceError):
    """A snapshot was refused for what it is: its signal for its files or metadata, or its content
    by a gate, whatever its name."""


class ProtocolError(ServiceError):
    """The answer is not of the documented form."""
