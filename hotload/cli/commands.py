"""Every command by its name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping

from hotload.cli.checkpoints import check, doctor
from hotload.cli.contents import inspect
from hotload.cli.deltas import apply, encode, fold, redress, verify
from hotload.cli.outcome import Outcome
from hotload.cli.progress import Bar
from hotload.cli.report import report

COMMANDS: Mapping[str, Callable[[Namespace, Bar | None], Outcome]] = {
    "encode": encode,
    "apply": apply,
    "verify": verify,
    "redress": redress,
    "fold": fold,
    "inspect": inspect,
    "check": check,
    "doctor": doctor,
    "report": report,
}
