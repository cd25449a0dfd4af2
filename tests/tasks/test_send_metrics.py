"""Metrics at Weights & Biases, by a package of that name which takes them, raises, or hangs."""

import json
from pathlib import Path

import pytest

from hotload.clients.metrics.send import _log_to_wandb
from hotload.spec import CycleSpec
from tests.factories import cycle_spec

PACKAGE = """
import json, os, pathlib, time

class Settings:
    def __init__(self, **given):
        self.given = given

class Run:
    def __init__(self, given):
        self.given = given

    def log(self, metrics, step):
        self.logged = {"metrics": metrics, "step": step}

    def finish(self):
        if os.environ["WANDB_SAYS"] == "hang":
            time.sleep(600)
        given = {name: value for name, value in self.given.items() if name != "settings"}
        pathlib.Path(os.environ["WANDB_FILE"]).write_text(json.dumps([given, self.logged]))

def init(**given):
    if os.environ["WANDB_SAYS"] == "raise":
        raise PermissionError("key wandb-0123456789 is not known")
    return Run(given)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CycleSpec:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_FILE", str(tmp_path / "logged.json"))
    return cycle_spec(wandb={"entity": "acme"})


async def test_a_step_is_logged(
    spec: CycleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "yes")
    assert await _log_to_wandb(spec, {"rollout/raw_reward": 0.5}) is None
    run = {"entity": "acme", "project": "hotload", "name": "run", "id": "run", "resume": "allow"}
    step = {"metrics": {"rollout/raw_reward": 0.5}, "step": 3}
    assert json.loads((tmp_path / "logged.json").read_text()) == [run, step]


async def test_a_line_is_a_run_of_its_own(
    spec: CycleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "yes")
    assert await _log_to_wandb(spec.model_copy(update={"line": 2}), {}) is None
    run, step = json.loads((tmp_path / "logged.json").read_text())
    assert (run["id"], run["name"], step["step"]) == ("run~2", "run, line 2", 3)


async def test_an_error_is_told_by_its_name_alone(
    spec: CycleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "raise")
    assert await _log_to_wandb(spec, {}) == "PermissionError"


@pytest.mark.slow
async def test_a_client_that_hangs_is_ended(
    spec: CycleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "hang")
    monkeypatch.setattr("hotload.clients.metrics.send.WANDB_SECONDS", 1.5)
    assert await _log_to_wandb(spec, {}) == "not done in 1.5 s"
