"""A command line that cannot work: one sentence that names what is wrong, and exit code 2."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

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
    ("program", "option", "value", "reason"),
    [
        ("agent", "--bucket-option", "anon", "expected KEY=VALUE"),
        ("door", "--bucket-option", "anon", "expected KEY=VALUE"),
        ("agent", "--engine-url", "127.0.0.1:8000", "expected an http or https address"),
        ("door", "--agent", "127.0.0.1:8700", "expected an http or https address"),
        ("door", "--gate", "nothing:here", "cannot be imported"),
    ],
)
def test_the_option_that_is_wrong_is_named(
    told: Callable[..., str], program: str, option: str, value: str, reason: str
) -> None:
    more = ["--canary", "0.5"] if option == "--gate" else []
    said = told(program, option, value, *more)
    assert option in said
    assert reason in said
    assert "rollout function" not in said
