"""What a command ends with, and how it is printed: in lines for a person, in JSON for a program."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from hotload.cli.wording import one_line

OK = 0
FOUND = 1
USAGE = 2
REFUSED = 3
MACHINE = 4


@dataclass(frozen=True, slots=True)
class CommandResult:
    """`lines` go to standard output, `notes` to standard error, or `facts` alone as JSON."""

    facts: dict[str, Any]
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = OK


def tell(command: str, outcome: CommandResult, *, is_json: bool) -> None:
    """Print the outcome."""
    if is_json:
        head = {
            "command": command,
            "ok": outcome.exit_code == OK,
            "exit_code": outcome.exit_code,
        }
        print(json.dumps(head | outcome.facts))
    else:
        for line in outcome.lines:
            print(one_line(line))
        sys.stdout.flush()  # before what follows on the other stream
        for note in outcome.notes:
            print(f"hotload {command}: {one_line(note)}", file=sys.stderr)
    sys.stdout.flush()
