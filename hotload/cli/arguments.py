"""The arguments of every command; each help page teaches with an example."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from hotload.cli.outcome import USAGE
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect

ABOUT = """
Lossless deltas between the checkpoints of a training run: write them, apply them, look into them,
and bring a checkpoint into the layout an inference service wants. Works on local directories; only
`report`, `store` and `service` open a connection. Outputs appear whole or not at all.
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
  1    check found an error; verify a difference; store show a broken chain;
       service status something that a person has to do
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
A directory without model.weight.spec.json is checked as a cycle publishes it: its layers in files
of their own, read where they lie. The last line says so.
"""
_DOCTOR = """
Write the checkpoint DIR again into the new directory OUT, in the layout a service wants: one layer
a file; embeddings, final norm and head each in a file of their own; index and spec; every file
below 5 GB. A head that is a copy of the embeddings is left out where config.json ties the two.
What no server reads (optimizer and trainer state, logs, pickles, sub-directories) stays behind. No
weight changes: the output is read back and compared byte for byte before it gets its name.
--config-from BASE takes the base model's config.json, where a library has saved it in other words;
quantization_config stays, and fields with another meaning are named.
"""

_REPORT = """
Write the page of the training run RUN, from the reports that its cycles left in the store at URL:
s3://, gs://, file:// or a path. Reward with its spread, bytes, seconds, failures and drift over the
policy versions, and the chain with what is served. The page is one HTML file that loads
nothing. Every cycle writes the same into the store, as _hotload/runs/RUN.html.
"""
_STORE = """
See what lies in a store, and say what stays there. `python -m flows.retain`, of the pipeline,
removes what nothing needs.
"""
_LIST = """
List every snapshot of the store at URL: s3://, gs://, file:// or a path. With --service, once for
each service that loads from it, also what they serve, load, or failed on.
"""
_SHOW = """
Show the chain that IDENTITY is served by, its full snapshot first, with the bytes that a replica
which joins late has to load, and what follows it. Exit code 1 if a link is not in the store.
"""
_VERIFY_STORE = """
Read every object of the store's snapshots, or of those named, and hold its size and SHA-256 to the
manifest that names it. Objects are read in pieces of 8 MiB, so memory stays small. Exit code 1 if
one is missing or differs.
"""
_PIN = """
Keep the snapshot IDENTITY, with all that its chain needs, from being removed until it is unpinned.
"""
_UNPIN = """
Let the snapshot IDENTITY go again, when nothing else keeps it; also a pin whose snapshot is gone.
"""
_DELETE = """
Remove the snapshot IDENTITY: its manifest, then its objects. Refused while a service serves it,
another snapshot needs it, it is pinned, or a cycle publishes. Name every service that loads from
the store: of any other nothing is known.
"""
_SERVICES = """
a service is ACCOUNT/MODEL/DEPLOYMENT, or that with @URL of its API; without
it FIREWORKS_BASE_URL counts, then the vendor's. Its key is FIREWORKS_API_KEY.
plain:ACCOUNT/MODEL/DEPLOYMENT@URL is a door without a control plane.
"""
_SERVICE = """
Look at an inference service that is hot-loaded, and at its ledger.
"""
_STATUS = """
Show what every replica serves, whether it is ready, what it loads or failed on. With the store that
it loads from also: what follows what, what is missing, who publishes, and what to do next. Exit
code 1 where a person has to do something.
"""
_LEDGER = """
Show what the service has loaded since its ledger was reset, newest first. No public source says how
the vendor's API shows it; where it does not, its own command line does.
"""
_RESET = """
Make the service forget every snapshot: base weights answer at once, and the next cycle publishes a
full one. Asks for the name of the deployment on standard input. With the store, refused while a
cycle publishes.
"""
_CREDENTIALS = """
credentials come from the environment, as for the cloud's own tools: an AWS
profile or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS
"""


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line in JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        """End the process: what is wrong with the command line."""
        name = self.prog.removeprefix("python -m ").removeprefix("hotload").strip() or "hotload"
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
    _add_delta_commands(commands, worker_count)
    _add_checkpoint_commands(commands)
    _add_report_command(commands)
    _add_store_commands(commands)
    _add_service_commands(commands)
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(USAGE)
    return parser.parse_args(arguments)


def _add_command(
    commands: Any,
    name: str,
    tells: str,
    about: str,
    paths: Sequence[str],
    *examples: str,
    more: str = "",
) -> Parser:
    added: Parser = commands.add_parser(
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


def _add_delta_commands(commands: Any, worker_count: int) -> None:
    command = partial(_add_command, commands)

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


def _add_checkpoint_commands(commands: Any) -> None:
    command = partial(_add_command, commands)
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
    doctor = command(
        "doctor",
        "bring a checkpoint into the layout a service wants",
        _DOCTOR,
        ("DIR", "OUT"),
        "saved-by-trainer ready-to-publish",
        "saved new --config-from base-model",
    )
    help_text = "take config.json from here, the base model"
    doctor.add_argument("--config-from", type=_existing, metavar="BASE", help=help_text)


def _add_report_command(commands: Any) -> None:
    report = _add_command(
        commands,
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


def _add_store_commands(commands: Any) -> None:
    group = commands.add_parser(
        "store",
        help="what lies in a store, digests, pins; list, show, verify, pin, unpin, delete",
        description=_filled(_STORE),
        epilog="example:\n  %(prog)s list s3://acme-rl/rollouts",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = group.add_subparsers(dest="verb", title="commands", metavar="COMMAND", required=True)
    url, identity = "s3://acme-rl/rollouts", "grpo7-000012-3fa92c1b"
    service = "--service acme/qwen3-30b/rollouts"

    def verb(
        name: str, tells: str, about: str, *examples: str, takes: str | None, asks: bool
    ) -> Parser:
        more = _CREDENTIALS + (_SERVICES if asks else "")
        added = _add_command(verbs, name, tells, about, (), *examples, more=more)
        added.set_defaults(command=f"store {name}")
        added.add_argument("url", metavar="URL", help="the store")
        if takes is not None:
            added.add_argument(
                "identity", metavar="IDENTITY", nargs=takes or None, help="of a snapshot"
            )
        if asks:
            added.add_argument(
                "--service",
                action="append",
                default=[],
                required=name == "delete",
                metavar="NAMES",
                help="a service that loads from the store; may be given again",
            )
        return added

    verb("list", "every snapshot, with what serves or pins it", _LIST, url, takes=None, asks=True)
    verb(
        "show",
        "the chain a snapshot is served by, and what follows it",
        _SHOW,
        f"{url} {identity}",
        takes="",
        asks=True,
    )
    verb(
        "verify",
        "every object against the digest in its manifest",
        _VERIFY_STORE,
        url,
        f"{url} {identity}",
        takes="*",
        asks=False,
    )
    verb(
        "pin", "keep a snapshot and what it needs", _PIN, f"{url} {identity}", takes="", asks=False
    )
    verb("unpin", "let it go again", _UNPIN, f"{url} {identity}", takes="", asks=False)
    verb(
        "delete",
        "remove a snapshot that nothing needs",
        _DELETE,
        f"{url} {identity} \\\n      {service}",
        takes="",
        asks=True,
    )


def _add_service_commands(commands: Any) -> None:
    group = commands.add_parser(
        "service",
        help="what its replicas do and what is next, its ledger; status, ledger, reset",
        description=_filled(_SERVICE),
        epilog="example:\n  %(prog)s status --cycle cycle.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = group.add_subparsers(dest="verb", title="commands", metavar="COMMAND", required=True)
    service = "--service acme/qwen3-30b/rollouts"

    def verb(name: str, tells: str, about: str, *examples: str) -> Parser:
        more = _SERVICES + _CREDENTIALS
        added = _add_command(verbs, name, tells, about, (), *examples, more=more)
        added.set_defaults(command=f"service {name}")
        named = added.add_mutually_exclusive_group(required=True)
        named.add_argument("--service", metavar="NAMES", help="the service")
        help_text = "the service and store of a cycle file, declared below its `blocks:`"
        named.add_argument("--cycle", type=_existing, metavar="FILE", help=help_text)
        added.add_argument("--store", metavar="URL", help="the store that it loads from")
        return added

    verb(
        "status",
        "every replica, and what is to be done",
        _STATUS,
        "--cycle cycle.yaml",
        f"{service} --store s3://acme-rl/rollouts",
    )
    verb("ledger", "what it has loaded, newest first", _LEDGER, service)
    reset = verb("reset", "forget every snapshot; base weights answer", _RESET, service)
    reset.add_argument("--yes", action="store_true", help="do not ask for the deployment's name")


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
