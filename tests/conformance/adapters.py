"""How an encoder or receiver is plugged in: a module of Python, or a file of command lines.

A `.py` adapter is loaded and called in this process. It has

    READS, WRITES   the dresses it knows, such as "fireworks/adler32"; leave out what it has not
    encode(base, target, out, dress)    write the delta directory `out`
    apply(base, delta, out)             write the restored checkpoint directory `out`
    check(directory)                    raise for a checkpoint that may not be published
    DEVIATIONS      {"group/case": "why it does otherwise"}; a sentence each, tested too
    REFUSALS        the exceptions that mean no; any Exception if left out

A `.toml` adapter has the same in lower case, `encode`, `apply` and `check` as shell commands with
{base} {target} {delta} {out} {directory} {dialect} {checksum} {version} {base_version} {python}.
Exit status 0 means yes, another means no, death by a signal fails the test.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.plain import Dress

HERE = Path(__file__).parent
# What is on trial; `python -m tests.conformance` puts the adapters it is given here.
ON_TRIAL = [HERE / "adapters" / "ours.py"]
DRESSES = (
    Dress("fireworks", "adler32", "run-000001-0badcafe", "run-000000-0badcafe"),
    Dress("slime", "adler32", "000001", "000000"),
    Dress("slime", "xxh3-128", "000001", "000000"),
    Dress("slime", "blake3", "000001", "000000"),
    Dress("coreweave", "adler32", "run-000001-0badcafe", "run-000000-0badcafe"),
)


class RefusedError(Exception):
    """A command ended with another status than 0."""


@dataclass(frozen=True)
class Adapter:
    """An encoder, a receiver, or both."""

    name: str
    path: Path
    reads: frozenset[str]
    writes: frozenset[str]
    deviations: Mapping[str, str]
    refusals: tuple[type[BaseException], ...]
    encode: Callable[[Path, Path, Path, Dress], object] = field(repr=False)
    apply: Callable[[Path, Path, Path], object] = field(repr=False)
    check: Callable[[Path], object] | None = field(repr=False)

    def deviation(self, case: str, dress: Dress) -> str | None:
        return self.deviations.get(case) or self.deviations.get(f"{case}@{dress}")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """Where to build `out`, which is there when the block ends, and is not if it raises.

    For adapters of implementations that leave this to their caller.
    """
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    try:
        yield staged
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(path: Path) -> Adapter:
    """The adapter in `path`."""
    found = _commands(path) if path.suffix == ".toml" else _module(path)
    known = {str(dress) for dress in DRESSES}
    for key in ("reads", "writes"):
        if unknown := set(found[key]) - known:
            raise ValueError(f"{path}: {key} {sorted(unknown)}; known: {sorted(known)}")
    return Adapter(
        name=path.stem,
        path=path,
        reads=frozenset(found["reads"]),
        writes=frozenset(found["writes"]),
        deviations=found["deviations"],
        refusals=found["refusals"],
        encode=found["encode"],
        apply=found["apply"],
        check=found["check"],
    )


def _module(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        "reads": getattr(module, "READS", ()),
        "writes": getattr(module, "WRITES", ()),
        "deviations": getattr(module, "DEVIATIONS", {}),
        "refusals": getattr(module, "REFUSALS", (Exception,)),
        "encode": getattr(module, "encode", None),
        "apply": getattr(module, "apply", None),
        "check": getattr(module, "check", None),
    }


def _commands(path: Path) -> dict[str, Any]:
    told = tomllib.loads(path.read_text(encoding="utf-8"))

    def run(verb: str, **values: object) -> None:
        values["python"] = sys.executable
        quoted = {key: shlex.quote(str(value)) for key, value in values.items()}
        done = subprocess.run(
            told[verb].format(**quoted), shell=True, stderr=subprocess.PIPE, text=True
        )
        # A shell tells the death of its child as 128 + signal.
        assert 0 <= done.returncode < 128, (
            f"{verb}: status {done.returncode}: {done.stderr[-2000:]}"
        )
        if done.returncode:
            raise RefusedError(done.stderr[-2000:])

    def encode(base: Path, target: Path, out: Path, dress: Dress) -> None:
        run("encode", base=base, target=target, out=out, **asdict(dress))

    def apply(base: Path, delta: Path, out: Path) -> None:
        run("apply", base=base, delta=delta, out=out)

    def check(directory: Path) -> None:
        run("check", directory=directory)

    return {
        "reads": told.get("reads", ()) if "apply" in told else (),
        "writes": told.get("writes", ()) if "encode" in told else (),
        "deviations": told.get("deviations", {}),
        "refusals": (RefusedError,),
        "encode": encode,
        "apply": apply,
        "check": check if "check" in told else None,
    }
