"""Cycle files that a person got wrong, and the one to copy."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from flows.__main__ import main, translate
from flows.cycle_file import load_cycle_file, parse_cycle_file, parse_run_file
from hotload.spec import CycleSpec
from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec

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
        (
            f"{GOOD}\nblocks: {{account: {{api_key: [hush]}}}}",
            "api_key: found a list, expected text",
        ),
        (f"{GOOD}\nblocks: {{account: {{api_kei: hush}}}}", "blocks.account: unknown ['api_kei']"),
        (f"{GOOD}\nblocks: {{service: hush}}", "blocks.service is refused"),
        ("cycle: {run_id: a/b}", "  run_id: Value error, identity 'a/b' refused"),
        (
            "cycle: {checkpoin: /c}",
            "not permitted; did you mean `checkpoint`?",
        ),
        (
            f"{GOOD[:-1]}, sampling: {{groups: {{on_uniforms: keep}}}}}}",
            "did you mean `on_uniform`?",
        ),
        (f"{GOOD[:-1]}, wandb: {{entiti: x}}}}", "not permitted; did you mean `entity`?"),
        (f"{GOOD}\nblocks: {{stor: {{}}}}", "unknown ['stor']; did you mean `store`?"),
        (f"{GOOD}\nblocks: {{store: {{urll: hush}}}}", "unknown ['urll']; did you mean `url`?"),
        (None, "cycle.yaml cannot be read: No such file"),
        ("", "cycle.yaml is empty: expected a mapping with `cycle:`"),
        ("# all of it a comment", "cycle.yaml is empty: expected a mapping with `cycle:`"),
        ("\udcff", "is not text in UTF-8"),
        (
            "cycle: {policy_version: abc}",
            "policy_version: found 'abc' (str), expected a whole number",
        ),
        ("cycle: {policy_version: 1.5}", "policy_version: found 1.5, expected a whole number"),
        ("cycle: {policy_version: -1}", "found -1, expected greater than or equal to 0"),
        ("cycle: {policy_version: [hush]}", "found a list, expected a whole number"),
        ("cycle: {policy_version: }", "policy_version: found nothing, expected a whole number"),
        ("cycle: {run_id: 7}", "run_id: found 7, expected text"),
        (
            "cycle: {run_id: a, sampling: {nodes: [../x]}}",
            "sampling.nodes.0: found text, which should match pattern",
        ),
        ("cycle: {sampling: hush}", "sampling: found text, expected a mapping"),
        ("cycle: {sampling: {temperature: hot}}", "found 'hot' (str), expected a number"),
        ("cycle: {reward: {per_group: 2}}", "per_group: found 2, expected true or false"),
        ("cycle: {reward: {advantage: gropo}}", "found 'gropo' (str), expected 'grpo', 'leave"),
        (f"{GOOD}\nblocks: {{store: {{url: [hush]}}}}", "url: found a list, expected text"),
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
        file.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "argv", ["cycle", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
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


def test_the_example_is_refused_until_its_names_are_replaced(tmp_path: Path) -> None:
    example = (ROOT / "examples/cycle.yaml").read_text()
    with pytest.raises(ValueError, match="names of the example") as refused:
        parse_cycle_file(ROOT / "examples/cycle.yaml")
    declared = re.sub(r"#.*", "", example)
    for line in filter(re.compile(r"[A-Z]{3}").search, declared.splitlines()):
        assert re.sub(r" +", " ", line).strip() in str(refused.value)
    names = re.sub(r"\b(ACCOUNT|MODEL|DEPLOYMENT|BUCKET|RUN)\b", "mine", declared)
    (tmp_path / "cycle.yaml").write_text(names)
    assert parse_cycle_file(tmp_path / "cycle.yaml")[0].run_id == "mine"


def test_the_example_cycle_file_shows_every_default() -> None:
    document = yaml.safe_load((ROOT / "examples/cycle.yaml").read_text())
    cycle = document["cycle"]
    needed = (*CycleSpec.model_json_schema()["required"], "problems")
    required = {name: cycle[name] for name in needed}
    assert CycleSpec.model_validate(cycle) == CycleSpec.model_validate(required)


def test_the_example_run_file_shows_every_default(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of the example"):
        parse_run_file(ROOT / "examples/rl_loop.yaml", TrainingSpec)
    text = re.sub(
        r"\b(ACCOUNT|MODEL|DEPLOYMENT|BUCKET|RUN)\b",
        "mine",
        (ROOT / "examples/rl_loop.yaml").read_text().replace("TEAM", "team.mine:trainer"),
    )
    (tmp_path / "run.yaml").write_text(text)
    spec, blocks = parse_run_file(tmp_path / "run.yaml", TrainingSpec)
    assert sorted(blocks) == ["rollouts", "service", "store"]
    training = yaml.safe_load(text)["training"]
    assert spec == TrainingSpec(cycle=spec.cycle, trainer=spec.trainer)
    # What is not shown as a field is shown as a comment.
    shown = {*training, *re.findall(r"^  # (\w+):", text, re.MULTILINE)}
    assert shown >= TrainingSpec.model_fields.keys() - {"cycle"}
    with pytest.raises(ValueError, match=r"python -m flows\.rl_loop"):
        parse_cycle_file(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"training": None}, "expected a mapping with `cycle:` and `training:`"),
        ({"training": {"trainer": {"name": "team"}}}, "expected `package.module:function`"),
        (
            {"training": {"trainer": {"name": "a:b"}, "windows": {"epoch": 1}}},
            "did you mean `epochs`",
        ),
        ({"cycle": {"run_id": "a"}}, "work_dir"),
        (
            {"training": {"trainer": {"name": "a:b"}, "windows": {"epochs": "two"}}},
            r"windows.epochs: found 'two' \(str\), expected a whole number",
        ),
        ({"training": {"trainer": {"name": "a:b"}, "epochs": 2}}, "it is a field of `windows`"),
    ],
    ids=str,
)
def test_a_run_file_that_cannot_be_is_refused(
    tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    cycle = {"run_id": "a", "work_dir": "/w", "problems": {"dataset": "/d"}}
    document = {"cycle": cycle, "training": {"trainer": {"name": "a:b"}}, **changed}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=told):
        parse_run_file(tmp_path / "run.yaml", TrainingSpec)


def test_a_recipe_becomes_a_run_file_that_asks_for_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = tmp_path / "recipe.py", tmp_path / "run.yaml"
    recipe.write_text("Config(log_path='logs', max_head_offpolicy_versions=1, kl_beta=0)")
    assert translate([str(recipe)]) == 0
    text = capsys.readouterr().out
    file.write_text(text)
    with pytest.raises(ValueError, match="names of the example") as refused:
        parse_run_file(file, AsyncTrainingSpec)
    assert "training.trainer.name: TEAM" in str(refused.value)
    for name in ("ACCOUNT", "MODEL", "DEPLOYMENT", "BUCKET", "RUN"):
        text = re.sub(rf"\b{name}\b", "mine", text)
    file.write_text(text.replace("TEAM", "team.mine:trainer"))
    spec, blocks = parse_run_file(file, AsyncTrainingSpec)
    assert spec.cycle.sampling.max_head_offpolicy_versions == 1
    assert sorted(blocks) == ["rollouts", "service", "store"]
    recipe.write_text("x = 1")
    with pytest.raises(SystemExit) as ended:
        translate([str(recipe)])
    assert ended.value.code == 2
    assert "has neither `Config(…)`" in capsys.readouterr().err


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
