"""What every command of the flows does at its end: one line for an error, and an exit code."""

import asyncio
import copy
import logging
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import prefect
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import get_current_settings

from blocks import SERVER_FAILURES, leave_server, quit_without_server
from hotload.errors import HotLoadError
from tasks.show import FLOW_LOGGER, TASK_LOGGER, tell_once

T = TypeVar("T")
PREFECT = str(Path(prefect.__file__).parent)
QUEUES = ("EventsWorker", "APILogWorker")  # at the end they say that they are not empty yet
AGAIN = re.compile(r"- Retry \d+/\d+ will start")


def run_command(work: Coroutine[Any, Any, T], show: Callable[[T], int]) -> int:
    """Run `work` and let `show` print its result; returns the exit code.

    `show` says 0 or 1; 1 also where the work failed, 2 for wrong input such as a block that is not
    there, 130 and 143 where it was stopped by Ctrl-C or SIGTERM.
    """
    show_no_traceback()
    show_own_lines()
    tell_once(at_the_end=True)
    try:
        return show(asyncio.run(work))
    except SERVER_FAILURES as error:
        quit_without_server(error)
    except (OSError, HotLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # Prefect's, for a block that is not there
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, TerminationSignal) as signal:
        print("stopped; start it again to go on", file=sys.stderr)
        return leave_server(143 if isinstance(signal, TerminationSignal) else 130)


def read_input(read: Callable[[], T]) -> T:
    """Return what is read; a file that cannot be, or is none of its kind, ends the command with
    one line and exit code 2."""
    try:
        return read()
    except OSError as error:
        print(f"error: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show_own_lines() -> None:
    """Keep Prefect's own lines out of the terminal, unless somebody has set its logging level.

    Above our lines of progress it tells of every task that begins and ends, and of one failure once
    for each task and flow that it ends; the command tells it at its end. Its server has it all.
    """
    if "level" in get_current_settings().logging.model_fields_set:
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    if not record.pathname.startswith(PREFECT):
        return True
    if record.name in QUEUES:
        return record.levelno > logging.WARNING
    if record.name not in (TASK_LOGGER, FLOW_LOGGER):
        return record.levelno >= logging.WARNING
    return record.levelno == logging.WARNING or bool(AGAIN.search(record.getMessage()))


def show_no_traceback() -> None:
    """Keep the tracebacks of errors that say themselves what to do out of the terminal.

    Prefect logs one for every failed task and flow, above our one line. The log on its server has
    them as ever, and so has the terminal those of any other error.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.format = _without_traceback(handler.format)  # type: ignore[method-assign, assignment]


def _without_traceback(
    render: Callable[[logging.LogRecord], str],
) -> Callable[[logging.LogRecord], str]:
    def rendered(record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (HotLoadError, *SERVER_FAILURES)):
            record = copy.copy(record)  # the other handlers show it whole
            record.exc_info = record.exc_text = None
        return render(record)

    return rendered
