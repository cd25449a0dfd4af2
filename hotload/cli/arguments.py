"""The arguments of every command; each help page teaches with an example."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from hotload.cli.outcome import USAGE
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect

ABOUT = """
Lossless deltas between the checkpoints of a training run: write them, apply them, look into them,
and bring a checkpoint into the layout an inference service wants. Works on local directories; only
`report` reads a store. Outputs appear whole or not at all.
"""
MORE = """
from two checkpoints, as a trainer saves them:
  %(prog)s doctor step-1 base               one layer a file, index, spec
  %(prog)s doctor step-2 target
  %(prog)s encode base target delta         a few percent of the bytes
  %(prog)s verify base delta target         bit for bit
  %(prog)s apply base delta restored

%(prog)s COMMAND --help tells more, with an example.

exit codes:
  0    done
  1    check found an error; verify found a difference
  2    the command line is wrong
  3    an input was refused
  4    this machine is in the way: disk full, no permission
  130  interrupted (143 terminated, 129 hung up, 141 nobody reads the output)
An error is one line: what was found, what was expected, who acts.
"""

_DIALECTS = """
dialects:
  fireworks  every tensor, Adler-32 in decimal; what the delta follows stands
             in the signal, which --identity and --previous print
  slime      tensors that changed; miles and SGLang's /pull_weights read it,
             too. Versions count: --identity 000002 --previous 000001
  coreweave  tensors that changed; ModelExpress reads it, too. Versions are
             names: --identity run-2 --previous run-1
"""
_ENCODE = """
Write the delta from checkpoint BASE to checkpoint TARGET into the new directory OUT. Both need the
same files, tensors, dtypes and shapes, and equal files beside the shards; `doctor` brings two
checkpoints into one layout. The frames are read by any zstd decoder; the output says which writer
made them. Two single .safetensors files work as well, then OUT is a file.
"""
_APPLY = """
Write the checkpoint that DELTA makes of BASE into the new directory OUT. Every tensor in the delta
is held to its checksum before OUT gets its name; a wrong base, a torn file, a delta applied twice
are refused, and BASE is only read.
"""
_VERIFY = """
Decode DELTA on BASE and compare with TARGET bit for bit. Nothing is written. Exit code 1 if a
tensor differs, or the delta cannot be applied to BASE.
"""
_CONVERT = """
Write a finished delta again for another family of receivers: new headers and index around the same
payloads, which are copied, not decoded.
"""
_CONVERT_BASE = """
--base DIR, the checkpoint the delta applies to, is needed for Fireworks where DELTA holds only the
tensors that changed. Checksums stay as they are.
"""
_FOLD = """
Make one delta out of consecutive ones, the oldest first, without the checkpoints between them: a
replica that missed some catches up in one step.
"""
_INSPECT = """
Tell what DIR holds: kind (full, delta, LoRA), dialect, what it follows, tensors, bytes, and per
layer how much changed. To count changes in a delta its frames are decoded piece by piece.
"""
_CHECK = """
Hold DIR to every layout rule: index, spec, headers, one layer a file, file sizes, quantization; of
a delta also the frames. One line per finding; warnings do not fail. With --previous a delta is held
to the layout it follows, and a full checkpoint is warned about where no delta on it is possible.
"""
_DOCTOR = """
Write the checkpoint DIR again into the new directory OUT, in the layout a service wants: one layer
a file; embeddings, final norm and head each in a file of their own; index and spec; every file
below 5 GB. A head that is a copy of the embeddings is left out where config.json ties the two.
Optimizer and trainer state, sub-directories and other formats stay behind. No weight changes: the
output is read back and compared byte for byte before it gets its name.
"""

_REPORT = """
Write the page of the training run RUN, from the reports that its cycles left in the store at URL:
s3://, gs://, file:// or a path. Reward with its spread, bytes, seconds, failures and drift over the
policy versions, and the chain with what is served. The page is one HTML file that loads
nothing. Every cycle writes the same into the store, as _hotload/runs/RUN.html.
"""
_CREDENTIALS = """
credentials come from the environment, as for the cloud's own tools: an AWS
profile or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS
"""


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line in JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        """End the process: what is wrong with the command line."""
        name = self.prog.split()[-1]
        if "--json" in sys.argv:
            found = {"class": "UsageError", "who": "caller", "message": message}
            facts = {"command": name, "ok": False, "exit_code": USAGE, "error": found}
            print(json.dumps(facts))
            self.exit(USAGE)
        command = "hotload" if name == "hotload" else f"hotload {name}"
        self.exit(USAGE, f"{command}: {message}; see {self.prog} --help [caller acts]\n")


def read_arguments(arguments: Sequence[str] | None, worker_count: int) -> argparse.Namespace:
    """Parse the command line; `worker_count` is the default of --workers.

    Ends the process after --help and on a wrong command line.
    """
    name = Path(sys.argv[0]).name
    parser = Parser(
        prog="hotload" if name == "hotload" else "python -m hotload",
        description=_filled(ABOUT),
        epilog=MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="COMMAND", required=True
    )

    def command(
        name: str, tells: str, about: str, paths: Sequence[str], *examples: str, more: str = ""
    ) -> Parser:
        added = commands.add_parser(
            name,
            help=tells,
            description=_filled(about),
            epilog="\n  ".join((f"{more}\nexample:", *(f"%(prog)s {one}" for one in examples))),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for path in paths:
            is_many = path.endswith("…")
            dest = path.rstrip("…").lower()
            kind = Path if dest == "out" else _existing
            added.add_argument(dest, type=kind, metavar=path, nargs="+" if is_many else None)
        added.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return added

    def workers(added: Parser) -> None:
        help_text = "threads that work at a time (all cores, %(default)s)"
        added.add_argument(
            "--workers", type=_count, default=worker_count, metavar="N", help=help_text
        )

    def lineage(added: Parser) -> None:
        help_text = "what this delta makes; see dialects"
        added.add_argument("--identity", metavar="NAME", help=help_text)
        added.add_argument("--previous", metavar="NAME", help="what it follows")

    encode = command(
        "encode",
        "write the delta between two checkpoints",
        _ENCODE,
        ("BASE", "TARGET", "OUT"),
        "base target delta",
        "base target w2 --dialect slime \\\n      --identity 000002 --previous 000001",
        more=_DIALECTS,
    )
    dialects = [dialect.value for dialect in Dialect]
    checksums = [checksum.value for checksum in Checksum]
    help_text = "family of receivers (%(default)s)"
    encode.add_argument("--dialect", choices=dialects, default=dialects[0], help=help_text)
    help_text = "of each tensor (%(default)s); another only with slime"
    encode.add_argument("--checksum", choices=checksums, default=checksums[0], help=help_text)
    lineage(encode)
    workers(encode)
    apply = command(
        "apply",
        "write the checkpoint a delta makes of its base",
        _APPLY,
        ("BASE", "DELTA", "OUT"),
        "base delta restored",
    )
    workers(apply)
    verify = command(
        "verify",
        "decode a delta and compare with its target, bit for bit",
        _VERIFY,
        ("BASE", "DELTA", "TARGET"),
        "base delta target && echo good",
    )
    workers(verify)
    convert = command(
        "convert",
        "write a delta again for another family of receivers",
        _CONVERT,
        ("DELTA", "OUT"),
        "delta cw --dialect coreweave \\\n      --identity run-2 --previous run-1",
        "cw again --dialect fireworks --base base",
        more=_filled(_CONVERT_BASE) + "\n" + _DIALECTS,
    )
    help_text = "family of receivers"
    convert.add_argument("--dialect", choices=dialects, required=True, help=help_text)
    lineage(convert)
    convert.add_argument("--base", type=_existing, metavar="DIR", help="what the delta applies to")
    workers(convert)
    fold = command(
        "fold",
        "make one delta out of consecutive ones",
        _FOLD,
        ("DELTA…", "OUT"),
        "delta-1-2 delta-2-3 delta-3-4 delta-1-4",
    )
    workers(fold)
    command(
        "inspect",
        "kind, lineage, tensors, bytes, what changed per layer",
        _INSPECT,
        ("DIR",),
        "delta",
        "delta --json | jq .density",
    )
    check = command(
        "check",
        "every layout rule, one line per finding",
        _CHECK,
        ("DIR",),
        "target",
        "delta --previous base",
    )
    help_text = "the checkpoint it follows"
    check.add_argument("--previous", type=_existing, metavar="DIR", help=help_text)
    command(
        "doctor",
        "bring a checkpoint into the layout a service wants",
        _DOCTOR,
        ("DIR", "OUT"),
        "saved-by-trainer ready-to-publish",
    )
    report = command(
        "report",
        "write the page of a run from what its cycles left in the store",
        _REPORT,
        (),
        "s3://acme-rl/acme-rollouts grpo7",
        "/data/store grpo7 --out page.html",
        more=_CREDENTIALS,
    )
    report.add_argument("url", metavar="URL", help="the store that the run's snapshots are in")
    report.add_argument("run", metavar="RUN", help="run_id of the training run")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the page is written, replacing what is there (RUN.html)",
    )
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(USAGE)
    return parser.parse_args(arguments)


def _version() -> str:
    try:
        return f"hotload {metadata.version('hotload')}"
    except metadata.PackageNotFoundError:
        return "hotload, not installed"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 79)


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"found nothing at {text!r}, expected it to be there")
    return path


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 1 to 9999")
    return int(text)
