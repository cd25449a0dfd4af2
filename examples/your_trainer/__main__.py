"""Run `learn_from_rollouts.py` against three emulated replicas: `make your-trainer`

The trainer has an environment of its own, with torch and without Prefect; the servers have ours.
Everything lies in `.demo/your_trainer/`; only loopback is used.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from examples.processes import emulator, prefect_server, process

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / ".demo" / "your_trainer"
SCRIPTS = Path(__file__).parent
NAMES = {"account_id": "demo", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--account", "demo", "--model", "tiny", "--deployment", "fleet"]


def main() -> int:
    """Serve cycles, and run the trainer; its exit code, or 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.your_trainer", description="A trainer of its own on the cycle."
    )
    parser.add_argument("--python", required=True, help="of an environment with transformers")
    parser.add_argument("--versions", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        return run(arguments.python, arguments.versions)
    except KeyboardInterrupt:
        print("stopped; every process of the example has ended", file=sys.stderr)
        return 130


def run(python: str, versions: int) -> int:
    """Start the servers, save the blocks, and run the trainer to its end."""
    shutil.rmtree(HERE, ignore_errors=True)
    bucket = HERE / "bucket"
    bucket.mkdir(parents=True)
    # The fleet serves what the trainer begins with, as transformers saves it.
    beginning = [python, str(SCRIPTS / "save_every_step.py"), str(HERE / "saved"), "0"]
    subprocess.run(beginning, check=True)
    base = HERE / "saved" / "step-0"
    (HERE / "cycle.json").write_text(json.dumps(declared()))
    log = HERE / "emulator.log"
    with (
        prefect_server(HERE / "prefect") as api,
        emulator(bucket.as_uri(), base, log, FLEET) as url,
    ):
        # Imported here: prefect reads its settings when it is imported.
        from examples.five_cycles import declare_blocks, problem_lines

        (HERE / "problems.jsonl").write_text("".join(problem_lines(8)))
        asyncio.run(declare_blocks(url, bucket.as_uri(), NAMES))
        served = f"{api}/deployments/name/checkpoint-to-rollout/served"
        with process(["-m", "flows.serve"], HERE / "serve.log", served):
            script = SCRIPTS / "learn_from_rollouts.py"
            given = (
                base,
                HERE / "checkpoints",
                HERE / "cycle.json",
                bucket.as_uri(),
                api,
                versions,
            )
            ended = subprocess.run(
                [python, str(script), *map(str, given)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                check=False,
            )
    return ended.returncode


def declared() -> dict[str, object]:
    """The cycle, less what the trainer says of each version."""
    return {
        "run_id": "yours",
        "service": "demo",
        "store": "demo",
        "rollouts": "demo",
        "work_dir": str(HERE / "work"),
        "problems": {"dataset": str(HERE / "problems.jsonl")},
        "readiness": {"poll_interval_seconds": 0.1, "warmup_after_hotload": False},
        "sampling": {"completions_per_prompt": 4, "max_completion_tokens": 8},
        "reward": {"name": "examples.rewards:letters"},
    }


if __name__ == "__main__":
    sys.exit(main())
