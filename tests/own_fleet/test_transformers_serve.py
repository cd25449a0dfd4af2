"""Two `transformers serve`, two agents, one door and our flow, by the commands of docs/agent.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.own_fleet.say import REQUESTS
from tests.servers import ROOT, LoopbackServer
from tests.waiting import PATIENCE_SECONDS

HERE = Path(__file__).parent
THEIRS = ROOT / ".own-fleet-venv" / "bin"
VERSIONS = range(1, 6)
CYCLE = """
blocks:
  account: {{base_url: {door}, account_id: local, model_id: policy, deployment_id: rollouts,
    api_key: any}}
  store: {{url: "{bucket}"}}
cycle:
  checkpoint: {saved}/step-{version}
  run_id: own
  policy_version: {version}
  work_dir: {root}/work
  readiness: {{poll_interval_seconds: 0.5}}
"""
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


def run(*command: str | Path) -> str:
    """Run a command to its good end; what it printed."""
    line = [*map(str, command)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(server: LoopbackServer, model: Path) -> list[str]:
    """What a server answers, as its clients ask it."""
    texts = []
    for request in REQUESTS:
        body = {
            "model": str(model),
            "prompt": request["prompt"],
            "seed": request["seed"],
            "generation_config": json.dumps(request["generation"]),
        }
        url = f"{server.address}/v1/completions"
        answer = httpx.post(url, json=body, timeout=PATIENCE_SECONDS).raise_for_status()
        texts.append(answer.json()["choices"][0]["text"])
    return texts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What transformers saves: the base model, then a directory for each version."""
    run(THEIRS / "python", HERE / "train.py", tmp_path / "saved", str(VERSIONS[-1]))
    return tmp_path / "saved"


@pytest.fixture
def places(tmp_path: Path, saved: Path) -> Iterator[dict[str, Any]]:
    """The servers by their agents' directories, and the door."""
    bucket = (tmp_path / "bucket").as_uri()
    (tmp_path / "bucket").mkdir()
    with ExitStack() as stack:

        def start(name: str, *command: str | Path) -> LoopbackServer:
            words = [*map(str, command)]
            server = LoopbackServer(name, tmp_path, lambda port: [*words, "--port", str(port)])
            stack.callback(server.stop)
            server.start()
            return server

        servers, agents = {}, []
        for name in ("replica-0", "replica-1"):
            server = start(
                f"serve-{name}",
                "env",
                "HF_HUB_OFFLINE=1",
                "OMP_NUM_THREADS=1",
                THEIRS / "transformers",
                "serve",
                "--device",
                "cpu",
            )
            servers[tmp_path / name / "current"] = server
            agents.append(
                start(
                    name,
                    sys.executable,
                    "-m",
                    "agent",
                    "--bucket",
                    bucket,
                    "--engine",
                    "transformers",
                    "--engine-url",
                    server.address,
                    "--model-dir",
                    tmp_path / name,
                    "--base-model",
                    saved / "step-0",
                    "--name",
                    name,
                )
            )
        listed = [word for one in agents for word in ("--agent", one.address)]
        door = start("door", sys.executable, "-m", "agent.door", "--bucket", bucket, *listed)
        for process in (*servers.values(), *agents, door):
            process.wait()
        yield {"servers": servers, "door": door.address, "bucket": bucket}


def test_each_version_is_what_both_servers_answer(
    prefect_api: str, places: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    answered, kept, kinds = {}, {}, []
    for version in VERSIONS:
        file = tmp_path / "cycle.yaml"
        file.write_text(CYCLE.format(**places, saved=saved, root=tmp_path, version=version))
        said = run(sys.executable, "-m", "flows", file, "--publish-only")
        kinds.append(said.split()[1])
        for link, server in places["servers"].items():
            answered[version, link] = answers(server, link)
            kept[version, link] = tmp_path / "kept" / f"{version}-{link.parent.name}"
            shutil.copytree(link, kept[version, link])
    assert kinds == ["full", "delta", "delta", "delta", "delta"]

    trained = [saved / f"step-{version}" for version in VERSIONS]
    spoken = json.loads(run(THEIRS / "python", HERE / "say.py", *trained, *kept.values()))
    assert len({json.dumps(spoken[str(path)]["texts"]) for path in trained}) == len(trained)
    for (version, link), texts in answered.items():
        expected = spoken[str(saved / f"step-{version}")]
        assert texts == expected["texts"], (version, link)
        assert spoken[str(kept[version, link])]["logprobs"] == expected["logprobs"]
