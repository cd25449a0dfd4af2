"""A command line that cannot work: one sentence that names what is wrong, and exit code 2."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent.__main__
import agent.door.__main__

AGENT = ["--engine", "command", "--reload", "true", "--name", "one"]
DOOR = ["--agent", "http://127.0.0.1:9"]


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The last line that an agent's or a door's command says."""

    def run(program: str, *options: str) -> str:
        is_door = program == "door"
        words = DOOR if is_door else [*AGENT, "--model-dir", str(tmp_path / "one")]
        line = [program, "--bucket", str(tmp_path), *words, *options]
        monkeypatch.setattr("sys.argv", line)
        main = (agent.door.__main__ if is_door else agent.__main__).main
        with pytest.raises(SystemExit, match="2"):
            raise SystemExit(main())
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize("program", ["agent", "door"])
def test_a_port_that_is_taken_is_named(told: Callable[..., str], program: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = told(program, "--port", str(port))
    assert said == f"{program}: 127.0.0.1:{port}: [Errno 98] Address already in use"
    assert "70000: " in told(program, "--port", "70000")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"limits": {"min_rewards": 1}}, "limits.min_rewards: Extra inputs are not permitted; did"),
        ({"reward": {"name": "nothing:here"}}, "reward 'nothing:here': cannot be imported"),
        ({"reward": {"name": "exact_match"}}, "`exact_match` cannot use the answers"),
        ({"problems": {"dataset": "/not/there"}}, "problems refused: /not/there"),
        ({"sampling": {"rollout": {"name": "nothing:here"}}}, "rollout function 'nothing:here'"),
    ],
)
def test_what_is_wrong_with_a_gate_is_told_at_the_start(
    told: Callable[..., str], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    rows = [{"prompt": f"{number}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"dataset": str(tmp_path / "rows.jsonl")}
    reward = {"name": "tests.agent.gate_rewards:one"}
    good = {"engine": "vllm", "model": "m", "problems": dataset, "reward": reward}
    file = tmp_path / "gate.yaml"
    file.write_text(yaml.safe_dump(good | changes))
    assert reason in told("door", "--canary", "0.5", "--gate-samples", str(file))
    assert "go with --canary" in told("door", "--gate-samples", str(file))
    both = ("--gate", "a:b", "--gate-samples", str(file), "--canary", "0.5")
    assert "not allowed with argument --gate" in told("door", *both)


@pytest.mark.parametrize(
    ("program", "option", "value", "reason"),
    [
        ("agent", "--bucket-option", "anon", "expected KEY=VALUE"),
        ("door", "--bucket-option", "anon", "expected KEY=VALUE"),
        ("agent", "--serves", "ftp://127.0.0.1", "expected an http or https address"),
        ("agent", "--engine-url", "127.0.0.1:8000", "expected an http or https address"),
        ("door", "--agent", "127.0.0.1:8700", "expected an http or https address"),
        ("door", "--gate", "nothing:here", "cannot be imported"),
        ("agent", "--peer", "127.0.0.1:8700", "expected an http or https address"),
        ("agent", "--peers", "agents", "expected HOST:PORT"),
        ("door", "--agents", "agents..local:8700", "expected HOST:PORT"),
        ("agent", "--poll-seconds", "nan", "expected seconds above 0"),
        ("agent", "--poll-seconds", "0", "expected seconds above 0"),
        ("agent", "--workers", "0", "expected 1 or more"),
        ("agent", "--reload", "POST /reload {path", "expected JSON behind the path"),
        ("door", "--gate-seconds", "inf", "expected seconds above 0"),
        ("door", "--gate-seconds", "-1", "expected seconds above 0"),
    ],
)
def test_the_option_that_is_wrong_is_named(
    told: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    option: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.setenv("HOTLOAD_PEER_KEY", "a-key")
    more = ["--canary", "0.5"] if option == "--gate" else []
    said = told(program, option, value, *more)
    assert option in said or value in said
    assert reason in said
    assert "rollout function" not in said


@pytest.mark.parametrize("key", [None, "", "two\nlines", "schlüssel"])
def test_peers_need_a_key_that_can_be_sent(
    told: Callable[..., str], monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("HOTLOAD_PEER_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("HOTLOAD_PEER_KEY", key)
    said = told("agent", "--peer", "http://127.0.0.1:8700")
    assert ("the peers' key has" if key else "HOTLOAD_PEER_KEY") in said
    assert key is None or not key or key not in said
