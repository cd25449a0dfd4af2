"""`python -m hotload` as a user meets it: what it prints, what it leaves, how it ends."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hotload
from hotload.__main__ import main
from tests.factories import snapshot_manifest
from tests.signals import signals_are_heard

ROOT = Path(hotload.__file__).parents[1]
COMMANDS = ("encode", "apply", "verify", "convert", "fold", "inspect", "check", "doctor", "report")
STORE_COMMANDS = tuple(
    f"store {verb}" for verb in ("list", "show", "verify", "pin", "unpin", "delete")
)


def save(directory: Path, step: int, *, files: int) -> Path:
    """What a trainer saves at a step: shards as they come, an index, and its own state."""
    directory.mkdir()
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.mlp.experts.{e}.w" for i in (0, 1, 10) for e in (0, 1)]
    generator = np.random.default_rng(7)
    tensors = {}
    for name in names:
        array = generator.standard_normal((200, 32)).astype(np.float16)
        if step and name != "model.norm.weight":
            array.reshape(-1)[step :: 50 + step] += np.float16(step)
        tensors[name] = array
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        mine = sorted(names)[number::files]
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "trainer_state.json").write_text(str(step))
    return directory


def save_vast(directory: Path) -> None:
    """2 GiB of zeros that take no room on the disk, and seconds to read."""
    directory.mkdir()
    size = 2 << 30
    entry = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    head = json.dumps({"model.embed_tokens.weight": entry}).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + size)
    (directory / "config.json").write_text("{}")


def loaded(directory: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a directory, by its index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found: dict[str, bytes] = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= {name: array.tobytes() for name, array in load_file(directory / file).items()}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints as saved, the first two as laid out, and the delta between these."""
    directory = tmp_path_factory.mktemp("made")
    for step in (1, 2, 3):
        save(directory / f"step-{step}", step, files=step)
    base, target, delta = (str(directory / name) for name in ("base", "target", "delta"))
    assert main(["doctor", str(directory / "step-1"), base]) == 0
    assert main(["doctor", str(directory / "step-2"), target]) == 0
    assert main(["encode", base, target, delta]) == 0
    return directory


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of these."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Runs a command and gives its exit code, its output and its errors, line by line."""
    capsys.readouterr()

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


Told = Callable[..., tuple[int, list[str], list[str]]]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hotload", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# The way of a checkpoint


def test_from_two_saved_checkpoints_to_a_delta_and_back(here: Path, told: Told) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    code, lines, errors = told("encode", "base", "target", "fresh")
    assert (code, errors) == (0, [])
    assert re.fullmatch(r"fresh: \S+ kB for 116 kB, 1 : \d+\.\d", lines[0])
    assert lines[1].startswith("9 tensors, 1 of them unchanged; ")
    assert re.search(r"frames by (sequences|zstd level 1) \(", lines[2])
    assert told("check", "fresh", "--previous", "base")[:2] == (0, [])
    assert told("verify", "base", "fresh", "target")[0] == 0
    assert told("apply", "base", "fresh", "restored")[0] == 0
    for path in (here / "target").iterdir():
        assert path.read_bytes() == (here / "restored" / path.name).read_bytes()
    assert loaded(here / "restored") == loaded(here / "step-2")
    assert {path: path.read_bytes() for path in before} == before


def test_every_dialect_restores_and_goes_back(here: Path, told: Told) -> None:
    versions = {"slime": ("000002", "000001"), "coreweave": ("run-2", "run-1")}
    for dialect, (identity, previous) in versions.items():
        names = ("--dialect", dialect, "--identity", identity, "--previous", previous)
        assert told("convert", "delta", f"{dialect}-dressed", *names)[0] == 0
        assert told("encode", "base", "target", dialect, *names)[0] == 0
        for path in (here / dialect).iterdir():
            assert path.read_bytes() == (here / f"{dialect}-dressed" / path.name).read_bytes()
        assert told("verify", "base", dialect, "target")[0] == 0
        assert told("check", dialect, "--previous", "base")[:2] == (0, [])
        back = ("convert", dialect, f"{dialect}-back", "--dialect", "fireworks", "--base", "base")
        assert told(*back)[0] == 0
        for path in (here / "delta").iterdir():
            assert path.read_bytes() == (here / f"{dialect}-back" / path.name).read_bytes()


@pytest.mark.parametrize("checksum", ["adler32", "xxh3-128", "blake3"])
def test_slime_has_three_checksums(told: Told, checksum: str) -> None:
    names = ("--identity", "000002", "--previous", "000001", "--checksum", checksum)
    assert told("encode", "base", "target", "new", "--dialect", "slime", *names)[0] == 0
    assert told("verify", "base", "new", "target")[0] == 0


def test_consecutive_deltas_fold_into_one(here: Path, told: Told) -> None:
    assert told("doctor", "step-3", "last")[0] == 0
    assert told("encode", "target", "last", "delta-2")[0] == 0
    code, lines, _ = told("fold", "delta", "delta-2", "both")
    assert code == 0
    assert "2 deltas" in lines[0]
    assert told("verify", "base", "both", "last")[0] == 0


def test_single_files_work_too(here: Path, told: Told) -> None:
    base, target = (f"{name}/model-00002-of-00006.safetensors" for name in ("base", "target"))
    assert told("encode", base, target, "delta.safetensors")[0] == 0
    assert told("verify", base, "delta.safetensors", target)[0] == 0
    assert told("apply", base, "delta.safetensors", "restored.safetensors")[0] == 0
    assert (here / "restored.safetensors").read_bytes() == (here / target).read_bytes()
    assert told("encode", base, target, "delta.safetensors")[0] == 2
    assert told("apply", base, "delta.safetensors", "restored.safetensors")[0] == 2


def test_a_fireworks_delta_comes_with_the_body_of_its_signal(told: Told) -> None:
    names = ("--identity", "run-2", "--previous", "run-1")
    _, lines, _ = told("encode", "base", "target", "new", *names)
    assert json.loads(lines[3].removeprefix("signal it with ")) == {
        "identity": "run-2",
        "incremental_snapshot_metadata": {
            "previous_snapshot_identity": "run-1",
            "compression_format": "arc_v2",
            "checksum_format": "alder32",
        },
    }


# What is told


def test_inspect_tells_a_delta_layer_by_layer(here: Path, told: Told) -> None:
    code, lines, errors = told("inspect", "delta")
    assert (code, errors) == (0, [])
    assert lines[0] == "delta: delta, dialect fireworks"
    table = [line.split("  ")[0] for line in lines[lines.index("") + 1 :]]
    layers = [f"model.layers.{number}" for number in (0, 1, 10)]
    assert table == ["part", "embeddings", *layers, "final norm", "head"]
    old, new = loaded(here / "base"), loaded(here / "target")
    pairs = [(np.frombuffer(old[name], "u2"), np.frombuffer(new[name], "u2")) for name in old]
    changed = sum(int(np.count_nonzero(one != other)) for one, other in pairs)
    _, (line,), _ = told("inspect", "delta", "--json")
    facts = json.loads(line)
    assert facts["kind"] == "delta"
    assert facts["changed_element_count"] == changed
    assert facts["density"] == changed / (9 * 6400)
    assert facts["parts"][4]["changed_element_count"] == 0
    assert (facts["tensor_count"], facts["unchanged_tensor_count"]) == (9, 1)


def test_inspect_tells_what_a_delta_follows(here: Path, told: Told) -> None:
    names = ("--dialect", "slime", "--identity", "000002", "--previous", "000001")
    told("encode", "base", "target", "new", *names)
    _, lines, _ = told("inspect", "new")
    assert lines[:2] == ["new: delta, dialect slime", "makes 000002 of 000001"]
    _, (line,), _ = told("inspect", "new", "--json")
    facts = json.loads(line)
    assert facts["lineage"] == {"version": "000002", "base_version": "000001"}
    assert facts["counted_in"] == "bytes"  # nothing there tells the dtypes


def test_inspect_and_check_say_how_weights_are_quantized(here: Path, told: Told) -> None:
    directory = here / "mxfp4"
    directory.mkdir()
    tensors = {
        "model.layers.0.mlp.experts.up_proj_blocks": np.zeros((2, 8, 3, 16), np.uint8),
        "model.layers.0.mlp.experts.up_proj_scales": np.zeros((2, 8, 3), np.uint8),
    }
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (directory / "config.json").write_text(json.dumps(config))
    _, lines, _ = told("inspect", "mxfp4")
    assert lines[1] == "quantized: 1 tensor in mxfp4, groups of 32"
    code, lines, notes = told("check", "mxfp4")
    assert (code, lines) == (0, [])
    assert notes[-1].endswith("; quantized: 1 tensor in mxfp4, groups of 32")
    config["quantization_config"] = {"quant_method": "nvfp4", "weight_block_size": [1, 16]}
    (directory / "config.json").write_text(json.dumps(config))
    code, lines, notes = told("check", "mxfp4")
    assert (code, "quant_method nvfp4, and tensors in mxfp4" in lines[0]) == (1, True)
    assert "quantized:" not in notes[-1]


def test_inspect_tells_a_full_checkpoint_and_a_lora(here: Path, told: Told) -> None:
    _, lines, _ = told("inspect", "base")
    assert lines[:2] == [
        "base: full checkpoint, model_type llama",
        "9 tensors in 6 shards: F16 115 kB",
    ]
    lora = here / "lora"
    lora.mkdir()
    save_file({"a.lora_A.weight": np.ones((4, 8), "f4")}, lora / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "llama"}
    (lora / "adapter_config.json").write_text(json.dumps(adapter))
    code, lines, _ = told("inspect", "lora")
    assert (code, lines[0]) == (0, "lora: LoRA of llama, rank 4")
    code, lines, _ = told("check", "lora")
    assert (code, len(lines)) == (1, 1)
    assert "lora_pair" in lines[0]


def test_inspect_finds_the_chain_in_a_local_bucket(here: Path, told: Told) -> None:
    manifest = snapshot_manifest("run-000002-0123abcd", previous="run-000001-0123abcd")
    (here / "delta").rename(here / manifest.identity)
    records = here / "_hotload" / "snapshots"
    records.mkdir(parents=True)
    (records / f"{manifest.identity}.json").write_bytes(manifest.render())
    _, lines, _ = told("inspect", manifest.identity)
    assert lines[1] == "follows run-000001-0123abcd; number 1 after the full run-000001-0123abcd"
    (records / f"{manifest.identity}.json").write_text("{}")
    code, lines, errors = told("inspect", manifest.identity)
    assert (code, lines, len(errors)) == (3, [], 1)


def test_check_prints_one_line_per_finding_and_lets_warnings_pass(here: Path, told: Told) -> None:
    code, lines, errors = told("check", "step-2")
    assert (code, len(lines)) == (0, 1)
    assert "trainer_state.json: left_out" in lines[0]
    assert errors == [
        "hotload check: step-2: full snapshot, 0 errors, 1 warning; a cycle publishes 2 files as"
        " 6 shards, one layer a file"
    ]
    (here / "step-2" / "model.weight.spec.json").write_text("{}")  # says that it is laid out
    code, lines, errors = told("check", "step-2")
    assert code == 1
    assert len(lines) == 4
    assert "tensor_map" in lines[0]
    assert "one_layer" in lines[1]
    assert "trainer_state.json: left_out" in lines[3]
    said = "full snapshot, 3 errors, 1 warning; a cycle publishes it file by file: 2 shards"
    assert errors == [f"hotload check: step-2: {said}"]
    (here / "base" / "old.pt").write_bytes(b"")
    code, lines, errors = told("check", "base")
    assert (code, len(lines)) == (0, 1)
    assert "[warning, trainer acts]" in lines[0]


def test_check_refuses_a_tied_head_of_other_bytes(here: Path, told: Told) -> None:
    (here / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    code, lines, _ = told("check", "base")
    assert (code, len(lines)) == (1, 1)
    assert "tied_head: found other bytes" in lines[0]


def test_other_files_beside_the_shards_are_no_matter_of_layout(here: Path, told: Told) -> None:
    """doctor was run; to run it again would change nothing."""
    (here / "target" / "tokenizer.json").write_text("[]")
    code, _, errors = told("encode", "base", "target", "never")
    assert code == 3
    assert "tokenizer.json; each time costs" in errors[0]
    assert "equal files beside the shards" in errors[0]


def test_doctor_takes_the_config_of_the_base_model(here: Path, told: Told) -> None:
    (here / "model").mkdir()
    config = '{"model_type": "llama", "torch_dtype": "float16", "new": 1}'
    (here / "model" / "config.json").write_text(config)
    code, _, errors = told("doctor", "step-3", "last", "--config-from", "model")
    assert code == 0
    assert (here / "last" / "config.json").read_text() == config
    assert any("config_taken" in line for line in errors)
    assert told("doctor", "step-3", "other", "--config-from", "nowhere")[0] == 2


def test_check_holds_a_full_checkpoint_against_the_one_before(here: Path, told: Told) -> None:
    assert told("check", "target", "--previous", "base")[:2] == (0, [])
    (here / "target" / "tokenizer.json").write_text("[]")
    code, lines, _ = told("check", "target", "--previous", "base")
    assert (code, len(lines)) == (0, 1)
    assert "drift" in lines[0]
    assert "tokenizer.json" in lines[0]


def damage_index(delta: Path) -> None:
    (delta / "model.safetensors.index.json").write_text("{}")


def damage_frame(delta: Path) -> None:
    path = delta / "model-00001-of-00006.safetensors"
    data = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    data[head] ^= 1
    path.write_bytes(data)


def damage_checksum(delta: Path) -> None:
    path = delta / "model-00001-of-00006.safetensors"
    text = re.sub(rb'("__metadata__":{"[^"]+":")\d', rb"\1x", path.read_bytes())
    path.write_bytes(text)


def lose_a_shard(delta: Path) -> None:
    (delta / "model-00001-of-00006.safetensors").unlink()


def lose_the_config(delta: Path) -> None:
    (delta / "config.json").unlink()


@pytest.mark.parametrize("previous", [(), ("--previous", "base")])
@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (damage_index, "index"),
        (damage_frame, "frame"),
        (damage_checksum, "checksum"),
        (lose_a_shard, "missing_shard"),
        (lose_the_config, "missing_file"),
    ],
)
def test_check_finds_what_is_wrong_with_a_delta(
    here: Path, told: Told, damage: Callable[[Path], None], rule: str, previous: tuple[str, ...]
) -> None:
    damage(here / "delta")
    code, lines, _ = told("check", "delta", *previous)
    assert code == 1
    assert any(f": {rule}: " in line for line in lines)


def test_doctor_says_what_it_did(told: Told) -> None:
    _, lines, _ = told("doctor", "step-3", "last")
    assert lines == [
        "last: 9 tensors in 6 shards, 116 kB; every byte compared with step-3",
        "left out trainer_state.json: no server reads it",
        "copied as they are: config.json, tokenizer.json",
    ]


def test_names_from_files_cannot_move_the_cursor(here: Path, told: Told) -> None:
    evil = here / "evil"
    evil.mkdir()
    save_file({"\x1b[2Jw\n": np.ones(3, "f4")}, evil / "model.safetensors")
    for arguments in (["inspect", "evil"], ["check", "evil"]):
        _, lines, errors = told(*arguments)
        assert "\x1b" not in "".join(lines + errors)
    _, lines, _ = told("inspect", "evil")
    assert lines[-1].startswith("other")


# JSON


@pytest.mark.parametrize(
    ("arguments", "code", "keys"),
    [
        ("encode base target new", 0, {"density", "ratio", "frame_writer", "size_bytes"}),
        ("apply base delta new", 0, {"out", "size_bytes"}),
        ("verify base delta target", 0, {"delta"}),
        ("verify target delta target", 1, {"error"}),
        ("convert delta new --dialect coreweave --identity b --previous a", 0, {"lineage"}),
        ("fold delta new", 0, {"delta_count"}),
        ("inspect delta", 0, {"kind", "parts"}),
        ("check delta", 0, {"findings"}),
        ("check step-1", 0, {"findings", "error_count"}),
        ("doctor step-1 new", 0, {"left_out", "dropped_heads"}),
        ("doctor delta new", 3, {"error"}),
        ("encode base target delta", 2, {"error"}),
        ("encode base", 2, {"error"}),
        ("inspect nowhere", 2, {"error"}),
    ],
)
def test_json_is_one_object_also_for_errors(
    told: Told, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, keys: set[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hotload", *arguments.split(), "--json"])
    found, lines, errors = told(*sys.argv[1:])
    facts = json.loads("".join(lines))
    assert (found, len(lines), errors) == (code, 1, [])
    assert facts.keys() >= {"command", "ok", "exit_code"} | keys
    assert (facts["command"], facts["ok"], facts["exit_code"]) == (
        arguments.split()[0],
        not code,
        code,
    )
    if "error" in keys:
        assert facts["error"].keys() >= {"class", "who", "message"}


# Errors and exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("verify target delta target", 1, "restores other bytes.*publisher acts"),
        ("apply target delta new", 3, "checksum is .*, expected .*publisher acts"),
        ("apply base target new", 3, "expected U8.*publisher acts"),
        ("apply step-1 delta new", 3, "publisher acts"),
        ("encode step-1 step-2 new", 3, "shard files changed.*doctor.*publisher acts"),
        ("doctor delta new", 3, "payloads of a delta, expected a full checkpoint.*trainer acts"),
        ("encode base target delta", 2, "something already, expected a new name.*caller acts"),
        ("encode base target no/such/new", 2, "no such directory.*caller acts"),
        ("encode base target base/new", 2, "may not lie in an input.*caller acts"),
        ("encode nowhere target new", 2, "BASE: found nothing at 'nowhere'.*caller acts"),
        (
            "encode base target new --dialect slime",
            2,
            "give --identity and --previous.*caller acts",
        ),
        ("encode base target new --identity a", 2, "go together.*caller acts"),
        ("encode base target new --identity a/b --previous a", 2, "'a/b' refused.*caller acts"),
        ("encode base target new --checksum blake3", 2, "--dialect slime alone.*caller acts"),
        ("encode base target new --workers 0", 2, "expected a number from 1 to 9999.*caller acts"),
        ("encode base target new --workers two", 2, "caller acts"),
        (
            "convert delta new --dialect slime --identity 2 --previous 1",
            2,
            "six digits.*caller acts",
        ),
        ("invent", 2, "invalid choice: 'invent'.*caller acts"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(
    here: Path, told: Told, arguments: str, code: int, text: str
) -> None:
    before = sorted(here.rglob("*"))
    found, lines, errors = told(*arguments.split())
    assert (found, lines, len(errors)) == (code, [], 1), errors
    assert errors[0].startswith("hotload")
    assert re.search(text, errors[0])
    assert sorted(here.rglob("*")) == before


def test_without_a_command_there_is_help_and_exit_code_2(told: Told) -> None:
    code, _, errors = told()
    assert code == 2
    assert errors[0] == "usage: hotload [-h] COMMAND ..." or errors[0].startswith(
        "usage: python -m"
    )


@pytest.mark.parametrize("name", [*COMMANDS, *STORE_COMMANDS])
def test_every_help_page_teaches_with_an_example_that_fits_a_terminal(
    told: Told, name: str
) -> None:
    code, lines, _ = told(*name.split(), "--help")
    assert code == 0
    examples = lines[lines.index("example:") + 1 :]
    assert examples
    for example in "\n".join(examples).replace("\\\n", "").splitlines():
        assert re.match(rf"  (python -m )?hotload {name} ", example)
    assert max(map(len, lines)) <= 80


def test_the_first_help_page_lists_commands_and_exit_codes(told: Told) -> None:
    _, lines, _ = told("--help")
    page = "\n".join(lines)
    assert all(f"    {name} " in page for name in (*COMMANDS, "store"))
    assert all(f"\n  {code} " in page for code in (0, 1, 2, 3, 4, 130))


def test_a_full_disk_is_one_line_exit_code_4_and_no_leftover(here: Path) -> None:
    """A limit on the size of files stands for the disk."""
    run = subprocess.run(
        command("doctor", "step-1", "new"),
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert (run.returncode, run.stdout) == (4, "")
    assert re.fullmatch(r"hotload doctor: .*large.*\[operator acts\]\n", run.stderr)
    assert not [path for path in here.iterdir() if "new" in path.name]


def test_a_reader_that_leaves_ends_it_quietly(here: Path) -> None:
    run = subprocess.Popen(
        command("inspect", "base"),
        cwd=here,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait() == 128 + signal.SIGPIPE


# Terminals and signals


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The command with a terminal as standard error, and the other end of that terminal."""
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment() | {"COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    return run, ours


def read_to_the_end(terminal: int) -> str:
    found = b""
    try:
        while piece := os.read(terminal, 4096):
            found += piece
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(terminal)
    return found.decode()


@pytest.mark.parametrize(
    "arguments",
    ["encode base target new", "inspect delta", "doctor step-1 new"],
)
def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(here: Path, arguments: str) -> None:
    run, terminal = on_a_terminal(*arguments.split(), cwd=here)
    drawn = read_to_the_end(terminal)
    assert run.stdout is not None
    assert run.stdout.read()
    run.stdout.close()
    assert run.wait() == 0
    name = arguments.split()[0]
    assert re.search(rf"\r{name} 100% \[#+\] \S+ kB of \S+ kB  \S+ .B/s  0:00 left", drawn)
    _, cleared, after = drawn.rpartition("\r\x1b[K")
    assert cleared
    assert "[#" not in after


@signals_are_heard()
@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        ("encode vast-1 vast-2 new", signal.SIGINT, 130),
        ("encode vast-1 vast-2 new --json", signal.SIGTERM, 143),
        ("doctor vast-1 new", signal.SIGINT, 130),
        ("doctor vast-1 new", signal.SIGHUP, 129),
    ],
)
def test_an_interrupt_in_the_middle_leaves_nothing(
    tmp_path: Path, arguments: str, number: signal.Signals, code: int
) -> None:
    """The first drawing of the bar shows that it is in the middle."""
    for step in (1, 2):
        save_vast(tmp_path / f"vast-{step}")
    run, terminal = on_a_terminal(*arguments.split(), cwd=tmp_path)
    begun = os.read(terminal, 4096)
    assert b"%" in begun
    run.send_signal(number)
    said = read_to_the_end(terminal)
    assert run.stdout is not None
    output = run.stdout.read().decode()
    run.stdout.close()
    assert run.wait() == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vast-1", "vast-2"]
    if "--json" in arguments:
        assert json.loads(output)["exit_code"] == code
    else:
        assert f"ended by {number.name}; nothing half-written is left" in said
        assert output == ""


# Without Prefect


def wheel_modules() -> set[str]:
    """Top-level modules of the distributions that the wheel depends on, however far away."""
    names, open_ends = set(), ["hotload"]
    while open_ends:
        name = re.split(r"[^\w.-]", open_ends.pop())[0].lower().replace("_", "-")
        if name not in names:
            names.add(name)
            try:
                found = requires(name) or []
            except ImportError:  # for another platform
                continue
            open_ends += [text for text in found if "extra ==" not in text]
    listed = packages_distributions()
    return {
        module
        for module, owners in listed.items()
        if any(owner.lower().replace("_", "-") in names for owner in owners)
    }


@pytest.mark.slow
def test_it_runs_on_the_dependencies_of_the_wheel_alone(here: Path) -> None:
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from hotload.__main__ import main\n"
        "codes = [main(line.split()) for line in sys.argv[1:]]\n"
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}\n"
        "print(codes, *new, file=sys.stderr)\n"
    )
    lines = [
        "doctor step-3 last",
        "encode base target new",
        "apply base delta restored",
        "verify base delta target",
        "inspect delta",
        "check delta",
    ]
    run = subprocess.run(
        [sys.executable, "-c", script, *lines],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    printed = run.stderr.splitlines()[-1]
    assert printed.startswith("[0, 0, 0, 0, 0, 0] ")
    modules = set(printed.partition("] ")[2].split())
    installed = set(packages_distributions())
    assert modules & installed <= wheel_modules()


def test_inspect_of_nothing_is_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty"), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["findings"][0]["rule"] == "no_shard"


def test_a_file_for_a_directory_is_the_callers_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "delta.safetensors"
    file.write_bytes(b"x")
    for command in ("inspect", "check"):
        assert main([command, str(file)]) == 2
        assert "expected a checkpoint directory [error, caller acts]" in capsys.readouterr().err


def test_a_delta_is_no_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, target = (save(tmp_path / name, step, files=1) for step, name in enumerate(("a", "b")))
    delta, out = str(tmp_path / "d"), str(tmp_path / "out")
    assert main(["encode", str(base), str(target), delta]) == 0
    assert main(["encode", delta, delta, out]) == 2
    assert "found a delta, expected a full checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "2.5", "foo", "99999999999999999999999"])
def test_a_number_of_workers_is_one(number: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["encode", ".", ".", "out", "--workers", number])
    assert ended.value.code == 2
    assert "expected a number from 1 to 9999" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("hotload 0.")
