"""`python -m hotload`: deltas and checkpoint directories from the command line, without Prefect."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from types import FrameType

from hotload.cli.arguments import read_arguments
from hotload.cli.checkpoints import check, doctor
from hotload.cli.contents import inspect
from hotload.cli.deltas import apply, convert, encode, fold, verify
from hotload.cli.outcome import MACHINE, CommandResult, tell
from hotload.cli.progress import progress_bar
from hotload.cli.refusals import UsageError, refusal
from hotload.cli.report import report
from hotload.cli.service import reset_ledger_by_hand, show_ledger, show_status
from hotload.cli.store import (
    delete_snapshot,
    list_snapshots,
    pin_snapshot,
    show_chain,
    unpin_snapshot,
    verify_store,
)
from hotload.errors import HotLoadError

COMMANDS = {
    one.__name__: one
    for one in (encode, apply, verify, convert, fold, inspect, check, doctor, report)
} | {
    "store list": list_snapshots,
    "store show": show_chain,
    "store verify": verify_store,
    "store pin": pin_snapshot,
    "store unpin": unpin_snapshot,
    "store delete": delete_snapshot,
    "service status": show_status,
    "service ledger": show_ledger,
    "service reset": reset_ledger_by_hand,
}

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNALLED = 128


class _Ended(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and tell how it ended; `--help` lists the exit codes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, TextIOWrapper(BytesIO()))
        # A name that the terminal cannot show is no reason to fail.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        with _ending():
            return _main(arguments)
    except _Ended as ended:  # while the result was printed
        return _SIGNALLED + ended.number
    except OSError as error:
        # Nobody reads, or its disk is full: what is still buffered must not fail once more when the
        # process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _SIGNALLED + signal.SIGPIPE
        print(f"hotload: standard output: {error.strerror} [operator acts]", file=sys.stderr)
        return MACHINE


def _main(arguments: Sequence[str] | None) -> int:
    try:
        options = read_arguments(arguments, _core_count())
    except SystemExit:
        sys.stdout.flush()  # the help page; a broken pipe shows here
        raise
    try:
        with progress_bar(options.command) as bar:
            outcome = COMMANDS[options.command](options, bar)
    except (HotLoadError, UsageError, OSError, MemoryError) as error:
        outcome = refusal(error)
    except _Ended as ended:
        line = f"ended by {signal.Signals(ended.number).name}; nothing half-written is left"
        facts = {"error": {"class": "Interrupted", "who": "caller", "message": line}}
        outcome = CommandResult(facts, notes=(line,), exit_code=_SIGNALLED + ended.number)
    tell(options.command, outcome, is_json=options.json)
    return outcome.exit_code


def _core_count() -> int:
    """Cores this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _ending() -> Iterator[None]:
    """Make the signals that end a process raise, once, so that what is half-written is removed.

    The second does nothing: an impatient Ctrl-C must not stop the cleaning up. The third ends the
    process as it would without us, should the first have been lost.
    """

    def end(number: int, _: FrameType | None) -> None:
        for one in before:
            signal.signal(one, pass_over)
        raise _Ended(number)

    def pass_over(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    # What was started with a signal ignored, as by nohup, goes on ignoring it.
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: one for number, one in handlers.items() if one is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
