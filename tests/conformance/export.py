"""The cases as files, for whoever would rather loop over directories: python -m
tests.conformance.export DIRECTORY

`receivers/<dialect>/<checksum>/<group>/<case>/` holds `base`, `delta-1` and so on, and `target`;
`encoders/<case>/` holds `base` and `target`; `checkers/<case>/` a checkpoint. `cases.json` lists
them: every delta but the last has to be accepted, and of the last `expects` tells what has to come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.adapters import DRESSES
from tests.conformance.checking import MAY_BE_PUBLISHED, MAY_NOT
from tests.conformance.encoding import for_encoders
from tests.conformance.plain import Dress, write_checkpoint
from tests.conformance.suite import for_receivers


def export(directory: Path, dresses: Sequence[Dress] = DRESSES) -> None:
    """Write the cases below `directory`, which must not exist."""
    directory.mkdir()
    cases = []
    for dress in dresses:
        for name, build in for_receivers(dress).items():
            case, path = build(dress), f"receivers/{dress}/{name}"
            write_checkpoint(directory / path / "base", case.base, case.sides)
            write_checkpoint(directory / path / "target", case.target, case.sides)
            for number, delta in enumerate(case.deltas, start=1):
                delta.write(directory / path / f"delta-{number}")
            cases.append({"path": path, "deltas": len(case.deltas), "expects": case.expects})
    for name, make in for_encoders(dresses[0]).items():
        task, path = make(), f"encoders/{name}"
        write_checkpoint(directory / path / "base", task.base, task.base_sides)
        write_checkpoint(directory / path / "target", task.target, task.target_sides)
        cases.append({"path": path, "expects": "delta" if task.is_possible else "refused"})
    for name, write in (MAY_BE_PUBLISHED | MAY_NOT).items():
        (directory / "checkers").mkdir(exist_ok=True)
        write(directory / "checkers" / name)
        expects = "passed" if name in MAY_BE_PUBLISHED else "refused"
        cases.append({"path": f"checkers/{name}", "expects": expects})
    (directory / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    export(Path(sys.argv[1]))
