"""Every family of `build.py` through doctor, check, encode, apply, verify and a whole cycle.

`make families`. Prints a table; exit code 1 if a family fails a step or could not be built.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from examples.processes import prefect_server
from hotload.directory.shards import open_shard, read_checkpoint

WIDTH = 20


class StepError(Exception):
    """What a step found, or did not find."""


def command(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of hotload; its JSON."""
    line = [sys.executable, "-m", "hotload", *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    facts: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise StepError(f"{arguments[0]}: {facts.get('error', facts.get('findings'))}")
    return facts


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape, bytes."""
    found = {}
    for header in read_checkpoint(directory).shards:
        with open_shard(directory / header.file) as shard:
            for one in header.tensors:
                data = bytearray(one.size_bytes)
                shard.read_into(header.data_start + one.start, memoryview(data))
                found[one.name] = one.dtype, one.shape, bytes(data)
    return found


def by_command_line(saved: Path, work: Path) -> dict[str, Any]:
    """Both steps into one layout, a delta between them, and back: equal in every tensor."""
    facts = command("doctor", saved / "step-1", work / "base")
    command("doctor", saved / "step-2", work / "target")
    checked = command("check", work / "target", "--previous", work / "base")
    if found := [one for one in checked["findings"] if one["rule"] == "drift"]:
        raise StepError(f"check: {found}")
    command("encode", work / "base", work / "target", work / "delta")
    command("verify", work / "base", work / "delta", work / "target")
    command("apply", work / "base", work / "delta", work / "restored")
    written, target = tensors_of(saved / "step-2"), tensors_of(work / "target")
    if tensors_of(work / "restored") != target:
        raise StepError("apply: other tensors than the target's")
    dropped = written.keys() - target.keys()
    if dropped - {*facts["dropped_heads"]} or any(written[one] != target[one] for one in target):
        raise StepError("doctor: other tensors than the trainer's")
    return facts


def by_cycle(work: Path) -> str:
    """Publish both as versions 1 and 2 to two emulated replicas, and sample them."""
    from flows.cycle import checkpoint_to_rollout  # Prefect reads its environment when imported
    from tests.flows.fleet import running_fleet, save_blocks

    (work / "fleet").mkdir()
    checkpoints = [work / "base", work / "base", work / "target"]
    with running_fleet("families", work / "fleet", checkpoints, engine="stub") as fleet:

        async def run() -> str:
            await save_blocks(fleet)
            kinds = []
            for version in (1, 2):
                problems = {"dataset": str(work / "problems.jsonl")}
                spec = fleet.spec(version, problems=problems, reward={"name": "length"})
                report = await checkpoint_to_rollout(spec)
                kinds.append(report.snapshot.kind.value)
                if report.rollouts is None or report.rollouts.failed_samples:
                    raise StepError(f"cycle {version}: {report.rollouts}")
            return ", ".join(kinds)

        return asyncio.run(run())


def main(saved: Path) -> int:
    """Print the table; 1 if a family failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        with prefect_server(root / "prefect"):
            print(f"{'family':{WIDTH}} {'tensors':>8} {'files':>6}  result", flush=True)
            for number, family in enumerate(sorted(saved.iterdir())):
                work = root / str(number)
                work.mkdir()
                rows = ({"id": str(n), "prompt": [n + 1, 5]} for n in range(2))
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (work / "problems.jsonl").write_text(lines)
                counts, result = " " * 15, ""
                try:
                    facts = by_command_line(family, work)
                    counts = f"{facts['tensor_count']:8} {facts['shard_count']:6}"
                    result = f"equal; cycles: {by_cycle(work)}"
                    if result != "equal; cycles: full, delta":
                        raise StepError(result)
                except Exception as error:  # noqa: BLE001 - each family is a line of the table
                    failed += 1
                    result = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
                print(f"{family.name:{WIDTH}} {counts}  {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
