"""The commands of docs/command-line.md, run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hotload.__main__ import main

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"


def save(directory: Path, step: int) -> None:
    """A checkpoint as a trainer saves it: one file."""
    directory.mkdir()
    tensors = {}
    for name in ("model.embed_tokens.weight", "model.layers.0.w", "model.norm.weight"):
        tensors[name] = np.random.default_rng(1).standard_normal((40, 10)).astype(np.float16)
        tensors[name][step] += 1
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_every_command_runs_in_the_order_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}", step)
    text = PAGE.read_text(encoding="utf-8")
    shown = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    for line in shown:
        *prefix, command, first = line.split(maxsplit=4)
        assert prefix == ["python", "-m", "hotload"]
        assert main([command, *shlex.split(first)]) == 0, capsys.readouterr()
    commands = {line.split()[3] for line in shown}
    listed = set(re.findall(r"^\| `([a-z]+) [A-Z]", text, re.MULTILINE))
    assert commands == listed - {"report"}  # reads a store: tests/tasks/test_run_records.py
    assert len(listed) == 9
