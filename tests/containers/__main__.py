"""Tries the containers without a container engine: `make containers`, as root on Linux.

Carries out the Dockerfile in a clean root directory, then starts every service of the compose file
in it, in the order and with the health checks, users and mounts that the file has; a toy stands for
the inference server, moto for the bucket. Ends well when a full and a delta cycle have been
published through door and agent, and sampled. What it cannot show: the base image itself, and the
networks of an engine; the services share one loopback that leads nowhere else.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.five_cycles import problem_lines, write_checkpoints
from tests.containers.files import Service, services
from tests.containers.image import Image
from tests.containers.toy_engine import digests

NEW_NETWORK = 0x40000000  # CLONE_NEWNET of Linux
SERVER = "http://127.0.0.1:4200"
STORE, BUCKET = "http://127.0.0.1:9000", "hotload"
SHELL = {
    "HOTLOAD_BUCKET": f"s3://{BUCKET}",
    "HOTLOAD_ENGINE": "command --version 'GET /info weight_version'"
    """ --reload 'POST /reload {"path": "{directory}", "name": "{identity}"}'""",
    "ENGINE_COMMAND": "python /srv/toy_engine.py",
    "HOTLOAD_DOOR_KEY": "key-of-the-door",
    "FIREWORKS_API_KEY": "key-of-the-door",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": STORE,
}
PATIENCE_SECONDS = 180
INSIDE = "--inside"


def main(arguments: Sequence[str]) -> int:
    """Try it in namespaces of its own; 0 if every service did its part, else 1, 2 without root."""
    if arguments[:1] == [INSIDE]:
        return inside(Path(arguments[1]))
    if os.geteuid():
        print("it makes namespaces and mounts: run it as root, on Linux", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="hotload-containers-") as directory:
        again = [sys.executable, "-m", "tests.containers", INSIDE, directory]
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return subprocess.run([*alone, *again]).returncode


def inside(directory: Path) -> int:
    """Build, start, run two cycles. Whatever it started and mounted ends with its namespaces."""
    directory.chmod(0o755)
    image = Image(directory)
    started = time.monotonic()
    try:
        image.build()
        say(f"built in {time.monotonic() - started:.0f} s")
        checkpoints = directory / "checkpoints"
        paths = write_checkpoints(checkpoints, 2)
        for path in checkpoints.rglob("*"):  # ours are written for their owner alone
            path.chmod(path.stat().st_mode | 0o444)
        (checkpoints / "problems.jsonl").write_text("".join(problem_lines(4)))
        read = {"HOTLOAD_CHECKPOINTS": str(checkpoints), "HOTLOAD_BASE_MODEL": str(paths[0])}
        found = services(SHELL | read)
        prepare(image, found)
        for service in found.values():
            start(image, service, directory)
        urllib.request.urlopen(f"{SERVER}/").close()  # the UI
        wait("cycles", lambda: ask(f"{SERVER}/api/deployments/name/checkpoint-to-rollout/served"))
        wait("engine", lambda: ask("http://127.0.0.1:8000/info"))
        for version, kind in ((1, "full"), (2, "delta")):
            publish(image, found["cycles"], paths[version], version, kind)
    except Exception:
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.stem}\n{log.read_text(errors='replace')[-3000:]}")
        raise
    say(f"a full and a delta are served and sampled; {time.monotonic() - started:.0f} s in all")
    return 0


def prepare(image: Image, found: dict[str, Service]) -> None:
    """Make the network, with a bucket in it, and the inference server's image."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "no network namespace")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with (image.root / "etc/hosts").open("a") as hosts:
        hosts.write(f"\n127.0.0.1 localhost {' '.join(found)}\n")
    (image.root / "srv").mkdir()
    shutil.copy(Path(__file__).with_name("toy_engine.py"), image.root / "srv")
    image.make_mount_points([*found.values()])
    os.environ |= SHELL
    with (image.root.parent / "store.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "9000"]
        subprocess.Popen(command, stdout=log, stderr=log)
    wait("store", lambda: ask(f"{STORE}/moto-api/data.json") is not None)
    store().create_bucket(Bucket=BUCKET)


def start(image: Image, service: Service, directory: Path) -> None:
    """Start a service, and return when its health check says that it answers."""
    say(f"{service.name}: {' '.join(service.words)}")
    with (directory / f"{service.name}.log").open("wb") as log:
        command = image.command(service, service.words)
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def is_healthy() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{service.name} ended with {process.returncode}")
        test = image.command(service, ["sh", "-c", service.health or "true"])
        return subprocess.run(test, capture_output=True).returncode == 0

    wait(service.name, is_healthy)


def publish(image: Image, cycles: Service, checkpoint: Path, version: int, kind: str) -> None:
    """Run a cycle as a trainer triggers it, and look at what the inference server then serves."""
    names = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
    engine = {**names, "base_url": "http://engine:8000", "dialect": "plain"}
    declared = {
        "blocks": {
            "service": {"account": {**names, "base_url": "http://door:8600"}},
            "store": {"url": f"s3://{BUCKET}"},
            "rollouts": {"engine": "vllm", "path_prefix": "", "account": engine},
        },
        "cycle": {
            "checkpoint": f"/checkpoints/{checkpoint.name}",
            "run_id": "boxes",
            "policy_version": version,
            "work_dir": "/var/lib/hotload/work",
            "problems": {"dataset": "/checkpoints/problems.jsonl"},
            "sampling": {"completions_per_prompt": 2, "max_completion_tokens": 4},
            "reward": {"name": "examples.rewards:letters"},
        },
    }
    (checkpoint.parent / "cycle.yaml").write_text(yaml.safe_dump(declared))
    trigger = ["python", "-m", "examples.trigger", "/checkpoints/cycle.yaml"]
    subprocess.run(image.command(cycles, trigger), check=True, timeout=PATIENCE_SECONDS)
    served = ask("http://127.0.0.1:8000/info")
    report = ask("http://127.0.0.1:8700/agent")
    key = f"_hotload/snapshots/{report['current']}.json"
    snapshot = json.load(store().get_object(Bucket=BUCKET, Key=key)["Body"])
    found = (served["weight_version"], served["digests"], snapshot["kind"])
    if found != (report["current"], digests(checkpoint), kind):
        raise RuntimeError(f"the engine serves {found}, the agent says {report}")
    say(f"the {kind} {report['current']} is served and sampled")


def ask(url: str) -> Any:
    """Get what JSON an address answers."""
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:
        return json.load(answer)


def store() -> Any:
    """Make a client of the bucket's store."""
    import boto3

    return boto3.client("s3")


def wait(name: str, is_so: Callable[[], object]) -> None:
    """Look until something is so; RuntimeError when that takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if is_so():
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{name} does not answer")


def say(text: str) -> None:
    """One line for the person watching."""
    print(f"containers: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
