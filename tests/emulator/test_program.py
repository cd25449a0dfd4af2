"""`python -m emulator` as a program: it says where it answers, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from emulator.control.faults import FAULTS
from emulator.control.settings import EmulatorConfig
from tests.servers import serve
from tests.signals import signals_are_heard
from tests.waiting import PATIENCE_SECONDS, wait_until


@pytest.mark.server
@signals_are_heard()
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_announces_its_address_and_cleans_up(
    publisher: Any, tmp_path: Path, number: signal.Signals
) -> None:
    work = tmp_path / "work"
    plan = tmp_path / "plan.yaml"
    plan.write_text("- {fault: respond, status: 429, count: 1}")
    arguments = ["--bucket", str(publisher.bucket), "--base-model", str(publisher.base)]
    arguments += ["--replicas", "2", "--port", "0", "--work-dir", str(work), "--api-key", "k"]
    arguments += ["--account", "acme", "--model", "m", "--deployment", "d", "--faults", str(plan)]
    command = [sys.executable, "-m", "emulator", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        assert line.startswith("emulator: http://127.0.0.1:")
        url = line.split()[1]
        body = {"model": "accounts/acme/deployments/d", "prompt": [1], "max_tokens": 3}
        headers = {"authorization": "Bearer k"}
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_SECONDS) as http:
            codes = [
                http.post("/inference/v1/completions", json=body).status_code for _ in range(2)
            ]
            assert codes == [429, 200]
            assert len(list(work.iterdir())) == 1
        program.send_signal(number)
        assert program.wait(PATIENCE_SECONDS) in (0, -number)
    assert not list(work.iterdir())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "emulator", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


@pytest.mark.slow
def test_help_teaches_every_fault_and_endpoint() -> None:
    told = run("--help")
    assert told.returncode == 0
    for word in (*FAULTS, "/emulator/tick", "--seconds-per-state"):
        assert word in told.stdout


@pytest.mark.slow
def test_what_cannot_start_says_why(tmp_path: Path, publisher: Any) -> None:
    bucket = ["--bucket", str(tmp_path)]
    missing = run(*bucket, "--base-model", str(tmp_path / "nowhere"))
    assert missing.returncode == 2
    assert "config.json" in missing.stderr
    assert "Traceback" not in missing.stderr
    (publisher.base / "config.json").write_text('{"model_type": "gpt2"}')
    other = run(*bucket, "--base-model", str(publisher.base))
    assert (other.returncode, "gpt2" in other.stderr) == (2, True)
    plan = tmp_path / "plan.yaml"
    plan.write_text("- fault: nothing")
    refused = run(*bucket, "--base-model", str(publisher.base), "--faults", str(plan))
    assert (refused.returncode, "respond" in refused.stderr) == (2, True)


@pytest.mark.server
def test_a_server_in_a_thread_that_cannot_start_raises(tmp_path: Path) -> None:
    config = EmulatorConfig(bucket=str(tmp_path), base_model=tmp_path, work_dir=tmp_path / "work")
    with pytest.raises(RuntimeError) as caught:
        serve(config)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.server
def test_the_command_line_opens_a_plain_door_with_a_base_of_its_own(
    publisher: Any, tmp_path: Path
) -> None:
    arguments = ["--bucket", str(publisher.bucket), "--base-model", str(publisher.base)]
    base = ["--base-identity", "exam-1"]
    wrong = run(*arguments, *base)
    assert (wrong.returncode, "goes with --dialect plain" in wrong.stderr) == (2, True)
    command = [sys.executable, "-m", "emulator", *arguments, *base, "--dialect", "plain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        url = program.stdout.readline().split()[1]
        headers = {
            "authorization": "Bearer k",
            "provider-model": "policy",
            "provider-deployment": "rollouts",
        }
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_SECONDS) as http:
            path = "/hot_load/v1/models/hot_load"

            def served() -> bool:
                replicas = http.get(path).raise_for_status().json()["replicas"]
                shown = {"readiness": True, "current_snapshot_identity": "exam-1"}
                return bool(replicas == [shown] * 3)

            wait_until(served)
            assert http.post(path, json={"identity": "exam-1"}).status_code == 200
            refused = http.post(path, json={"identity": "exam-2"})
            assert (refused.status_code, "serves base 'exam-1'" in refused.text) == (409, True)
            assert http.get("/v1/accounts").status_code == 404
        program.terminate()
        program.wait(PATIENCE_SECONDS)
