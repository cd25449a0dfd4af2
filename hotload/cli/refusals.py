"""Errors as one line each: what was found, what was expected, who must act; and the exit code."""

from __future__ import annotations

import errno
from dataclasses import asdict
from typing import Any

from hotload.cli.outcome import MACHINE, REFUSED, USAGE, CommandResult
from hotload.errors import (
    ChecksumMismatchError,
    DeltaError,
    HotLoadError,
    InvalidCheckpointError,
    InvalidIdentityError,
    LeaseLostError,
    NeedsFullSnapshotError,
    ServiceError,
    StoreError,
)

_ADVICE = {
    errno.ENOSPC: "room for the output: free some, or choose another OUT",
    errno.EDQUOT: "room within your quota: free some, or choose another OUT",
    errno.EACCES: "a file or directory that you may use",
    errno.EPERM: "a file or directory that you may use",
    errno.EROFS: "a directory that can be written",
    errno.ENOENT: "a directory that is there",
    errno.ENOTDIR: "a directory",
    errno.EEXIST: "a new name, or an empty directory",
    errno.EINVAL: "an OUT of its own",
    errno.EFBIG: "a file system and a limit (ulimit -f) that let a file grow so large",
    errno.EMFILE: "a higher limit of open files (ulimit -n)",
}
_EXIT_CODES = {"caller": USAGE, "operator": MACHINE}
_ABOUT_ARGUMENTS = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EINVAL}


class UsageError(Exception):
    """The arguments do not go together."""


def refusal(error: Exception) -> CommandResult:
    """Word an expected error, with its exit code."""
    if isinstance(error, InvalidCheckpointError):
        findings = error.findings
        facts = {"findings": [asdict(finding) for finding in findings]}
        lines = tuple(map(str, findings))  # a finding says itself who acts
        who = findings[0].who
        return _refusal(error, _EXIT_CODES.get(who, REFUSED), who, lines, facts)
    if isinstance(error, OSError) and not isinstance(error, HotLoadError):
        if error.errno in _ABOUT_ARGUMENTS:
            return _refused(error, USAGE, "caller", _os_line(error))
        return _refused(error, MACHINE, "operator", _os_line(error))
    if isinstance(error, MemoryError):
        line = "found too little memory, expected room for a few megabytes per worker"
        return _refused(error, MACHINE, "operator", line)
    if isinstance(error, UsageError | InvalidIdentityError):
        return _refused(error, USAGE, "caller", str(error))
    if isinstance(error, StoreError | ServiceError | LeaseLostError):
        return _refused(error, REFUSED, "operator", str(error))
    if isinstance(error, NeedsFullSnapshotError):
        expected = "one layout, which doctor makes, and equal files beside the shards"
        line = f"{error}, expected {expected}; or publish the target in full"
        return _refused(error, REFUSED, "publisher", line)
    if isinstance(error, ChecksumMismatchError):
        line = f"{error}: this is not its base, or the delta was applied before"
        return _refused(error, REFUSED, "publisher", line)
    if isinstance(error, DeltaError):
        return _refused(error, REFUSED, "publisher", str(error))
    return _refused(error, REFUSED, "caller", str(error))


def _refused(error: Exception, exit_code: int, who: str, line: str) -> CommandResult:
    summary = line if line.endswith("acts]") else f"{line} [{who} acts]"
    return _refusal(error, exit_code, who, (summary,), {"message": line})


def _refusal(
    error: Exception, exit_code: int, who: str, lines: tuple[str, ...], facts: dict[str, Any]
) -> CommandResult:
    error_facts = {"class": type(error).__name__, "who": who, "message": "; ".join(lines), **facts}
    return CommandResult({"error": error_facts}, notes=lines, exit_code=exit_code)


def _os_line(error: OSError) -> str:
    found = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    advice = _ADVICE.get(error.errno or 0, "a working disk and the right to use it")
    return f"{where}{found[:1].lower()}{found[1:]}, expected {advice}"
