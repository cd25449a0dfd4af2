"""Metrics at Weights & Biases, by a package of that name which takes them, raises, or hangs."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hotload.clients.metrics.send import open_wandb
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
        self.logged = [*getattr(self, "logged", []), {"metrics": metrics, "step": step}]

    def finish(self):
        if os.environ["WANDB_SAYS"] == "hang":
            time.sleep(600)
        given = {name: value for name, value in self.given.items() if name != "settings"}
        path = pathlib.Path(os.environ["WANDB_DIR"]) / (self.given["id"] + ".json")
        path.write_text(json.dumps([given, *self.logged]))

def init(**given):
    if os.environ["WANDB_SAYS"] == "raise":
        raise PermissionError("key wandb-0123456789 is not known")
    return Run(given)
"""


def install_client(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package where it is imported from; it writes what a run logged to `<id>.json`."""
    (directory / "wandb").mkdir()
    (directory / "wandb" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("WANDB_DIR", str(directory))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CycleSpec:
    install_client(tmp_path, monkeypatch)
    return cycle_spec(wandb={"entity": "acme"})


async def logged(
    spec: CycleSpec, steps: Mapping[int, Mapping[str, float]], part: str = "", name: str = ""
) -> str | None:
    """Log steps to the end; what went wrong."""
    log = await open_wandb(spec, part, name)
    assert log is not None
    wrong = [await log.log(metrics, step) for step, metrics in steps.items()]
    return next(filter(None, [*wrong, await log.close()]), None)


async def test_steps_are_logged_in_one_run(
    spec: CycleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "yes")
    metrics = {"rollout/raw_reward": 0.5}
    assert await logged(spec, {3: metrics, 4: {}}) is None
    run = {"entity": "acme", "project": "hotload", "name": "run", "id": "run", "resume": "allow"}
    steps = [{"metrics": metrics, "step": 3}, {"metrics": {}, "step": 4}]
    assert json.loads((tmp_path / "run.json").read_text()) == [run, *steps]


async def test_a_line_and_a_trainer_have_runs_of_their_own(
    spec: CycleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "yes")
    named = {
        ("2", "line 2"): ("run~2", "run, line 2"),
        ("training", ""): ("run~training", "run, training"),
    }
    for given, expected in named.items():
        assert await logged(spec, {3: {}}, *given) is None
        run, step = json.loads((tmp_path / f"{expected[0]}.json").read_text())
        assert (run["id"], run["name"], step["step"]) == (*expected, 3)


async def test_nothing_is_logged_where_nobody_is_named() -> None:
    assert await open_wandb(cycle_spec()) is None


async def test_an_error_is_told_once_and_by_its_name_alone(
    spec: CycleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "raise")
    log = await open_wandb(spec)
    assert log is not None
    assert await log.close() == "Weights & Biases did not take the metrics: PermissionError"
    assert await log.log({}, 4) is None
    assert await log.close() is None


@pytest.mark.slow
async def test_a_client_that_hangs_is_ended(
    spec: CycleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SAYS", "hang")
    monkeypatch.setattr("hotload.clients.metrics.send.WANDB_SECONDS", 1.5)
    assert "not done in 1.5 s" in str(await logged(spec, {3: {}}))
