"""Cycle files that a person got wrong, and the one to copy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.__main__ import main
from flows.cycle_file import load_cycle_file
from hotload.spec import CycleSpec

ROOT = Path(__file__).parents[2]
GOOD = (
    "cycle: {checkpoint: /c, run_id: r, policy_version: 1, work_dir: /w, problems: {dataset: /d}}"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cycle: [", "is not YAML, line 1"),
        ("api_key: hush: hush", "is not YAML, line 1"),
        ("cycle: " + "[" * 9999, "is not YAML"),
        ("checkpoint: /c", "expected a mapping with `cycle:`"),
        ("cycle: &a [*a]", "expected a mapping with `cycle:`"),
        ("cycle: {}\nblock: {}\n1: {}", "unknown ['1', 'block']"),
        ("cycle: {}\nblocks: [service]", "expected a mapping below `blocks:`"),
        ("cycle: {}\nblocks: {services: {}}", "unknown ['services']"),
        ("cycle: {api_key: hush}", "api_key: Extra inputs are not permitted"),
        ("cycle: {checkpoint: c}", "expected an absolute path, not a relative one"),
        ("cycle: {learning_rate: 0.1}", "your trainer owns its own training"),
        (f"{GOOD}\nblocks: {{store: {{key: hush}}}}", "blocks.store: unknown ['key']"),
        (f"{GOOD}\nblocks: {{service: {{api_key: [hush]}}}}", "api_key: Input should be"),
        (f"{GOOD}\nblocks: {{service: hush}}", "blocks.service is refused"),
        (None, "No such file"),
    ],
)
def test_a_wrong_cycle_file_exits_2_and_shows_no_value(
    text: str | None,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "cycle.yaml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["cycle", str(file)])
    assert main() == 2
    error = capsys.readouterr().err
    assert told in error
    assert "hush" not in error


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["a", "b"], 2)])
def test_the_local_command_explains_itself(
    arguments: list[str],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["cycle", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert "python -m flows" in "".join(capsys.readouterr())


def test_the_example_cycle_file_shows_every_default() -> None:
    document = yaml.safe_load((ROOT / "examples/cycle.yaml").read_text())
    cycle = document["cycle"]
    required = {name: cycle[name] for name in CycleSpec.model_json_schema()["required"]}
    assert CycleSpec.model_validate(cycle) == CycleSpec.model_validate(required)


@pytest.mark.slow
def test_a_prefect_server_that_is_down_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cycle.yaml"
    path.write_text(GOOD)
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    ended = subprocess.run(
        [sys.executable, "-m", "flows", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: Prefect server: http://127.0.0.1:9/api/ does not answer")
    assert len(ended.stderr.splitlines()) == 1


async def test_files_that_declare_other_blocks_never_share_them(
    prefect_api: str, tmp_path: Path
) -> None:
    def declared(run_id: str, bucket: str) -> Path:
        path = tmp_path / f"{run_id}-{bucket}.yaml"
        blocks = {"store": {"url": f"file://{tmp_path}/{bucket}"}}
        cycle = yaml.safe_load(GOOD)["cycle"] | {"run_id": run_id}
        path.write_text(yaml.safe_dump({"blocks": blocks, "cycle": cycle}))
        return path

    files = [declared("same-3", "a"), declared("SAME_3", "a"), declared("same-3", "b")]
    names = [(await load_cycle_file(path)).store for path in files]
    assert len(set(names)) == 3
    assert (await load_cycle_file(files[0])).store == names[0]
