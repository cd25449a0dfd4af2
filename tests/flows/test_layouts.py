"""Checkpoints as trainers write them, through whole cycles: whatever the layout, one thing is
served."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from flows.cycle import checkpoint_to_rollout
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.delta.byte_io import read_bytes
from hotload.directory.files import sha256_file
from hotload.directory.relayout import relayout_directory
from hotload.directory.shards import open_shard, read_checkpoint
from hotload.errors import InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import content_sha256
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import CycleProcess

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


Model = dict[str, Tensor]
Writer = Callable[[Path, Model], None]


def model_in(directory: Path) -> Model:
    """Every tensor of a directory of shards."""
    found: Model = {}
    for header in read_checkpoint(directory).shards:
        with open_shard(directory / header.file) as shard:
            for one in header.tensors:
                data = read_bytes(shard, header.data_start + one.start, one.size_bytes)
                found[one.name] = Tensor(one.dtype, one.shape, data)
    return found


def write_shard(path: Path, model: Model, **metadata: str) -> None:
    tensors, end = [], 0
    for name, tensor in model.items():
        start, end = end, end + len(tensor.data)
        tensors.append(TensorInfo(name, tensor.dtype, tensor.shape, start, end))
    head = render_header(tensors, {"format": "pt", **metadata})
    path.write_bytes(head + b"".join(one.data for one in model.values()))


def in_one_file(directory: Path, model: Model) -> None:
    write_shard(directory / "model.safetensors", model)


def in_files(count: int) -> Writer:
    """As `save_pretrained` writes it: in the order of the model, so that layers share files."""

    def write(directory: Path, model: Model) -> None:
        weight_map: dict[str, str] = {}
        names = list(model)
        size = -(-len(names) // count)
        for number in range(count):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            mine = names[number * size : (number + 1) * size]
            write_shard(directory / file, {name: model[name] for name in mine})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index))

    return write


def with_aliases(directory: Path, model: Model) -> None:
    """As `save_model` writes it: of the names of one tensor the first, the others in the header."""
    kept = {name: one for name, one in model.items() if name != EMBEDDINGS}
    write_shard(directory / "model.safetensors", kept, **{EMBEDDINGS: HEAD})


def tied(model: Model) -> Model:
    """The model with a head that is a copy of the embeddings."""
    return {**model, HEAD: model[EMBEDDINGS]}


def write_checkpoint(
    fleet: Fleet, version: int, write: Writer, *, of: int = 0, **settings: Any
) -> Model:
    """Write the weights of a version as a trainer would, into a directory of its own."""
    source, directory = fleet.checkpoints[of or version], fleet.root / f"trainer-{version}"
    directory.mkdir()
    model = model_in(source)
    if settings.get("tie_word_embeddings"):
        model = tied(model)
    write(directory, model)
    config = json.loads((source / CONFIG_FILE).read_text()) | settings
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory)
    return model


@pytest.fixture
def save(fleet: Fleet) -> Callable[..., Model]:
    """Writes the checkpoint of a version as `write_checkpoint` does."""
    return partial(write_checkpoint, fleet)


async def run(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    checkpoint = str(fleet.root / f"trainer-{version}")
    return await checkpoint_to_rollout(fleet.spec(version, checkpoint=checkpoint, **changes))


def baseline_of(fleet: Fleet, report: CycleReport) -> Path:
    """What this machine holds of the served snapshot: the full bytes in the served layout."""
    return fleet.root / "work" / "local" / "rollouts" / "baseline" / report.snapshot.identity


def assert_served(fleet: Fleet, report: CycleReport, model: Model) -> None:
    """Every replica serves the snapshot, which is this model in the served layout."""
    assert fleet.served() == {report.snapshot.identity}
    assert fleet.log()["client_bugs"] == []
    assert model_in(baseline_of(fleet, report)) == model
    stored = {path.name for path in (fleet.bucket / report.snapshot.identity).iterdir()}
    assert stored == {path.name for path in baseline_of(fleet, report).iterdir()}
    assert {INDEX_FILE, SPEC_FILE, "model-00009-of-00009.safetensors"} - stored in (
        set(),
        {"model-00009-of-00009.safetensors"},  # where the head is tied
    )


@pytest.mark.parametrize("write", [in_one_file, in_files(2), in_files(5)])
async def test_a_full_then_a_delta_of_what_save_pretrained_writes(
    fleet: Fleet, save: Callable[..., Model], write: Writer
) -> None:
    model = save(1, write)
    first = await run(fleet, 1)
    assert first.snapshot.kind is SnapshotKind.FULL
    assert_served(fleet, first, model)
    assert model_in(fleet.bucket / first.snapshot.identity) == model

    model = save(2, write)
    second = await run(fleet, 2)
    assert (second.outcome, second.snapshot.kind) == ("published", SnapshotKind.DELTA)
    assert second.snapshot.ratio > 10
    assert_served(fleet, second, model)


async def test_another_shard_map_is_no_reason_for_a_full(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    save(1, in_one_file)
    await run(fleet, 1)
    model = save(2, in_files(3), of=1)
    second = await run(fleet, 2)
    assert second.snapshot.kind is SnapshotKind.DELTA
    assert second.snapshot.ratio > 50  # the same weights: what travels is the tokenizer
    assert_served(fleet, second, model)
    model = save(3, in_files(4))
    third = await run(fleet, 3)
    assert third.snapshot.kind is SnapshotKind.DELTA
    assert_served(fleet, third, model)


@pytest.mark.parametrize("write", [in_one_file, in_files(3), with_aliases])
async def test_a_tied_head_is_left_out_wherever_it_lies(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path], write: Writer
) -> None:
    del prefect_api
    bases = tmp_path / "bases"
    bases.mkdir()
    base = Fleet("", "", bases, [*checkpoints])
    write_checkpoint(base, 1, in_one_file, tie_word_embeddings=True)
    relayout_directory(bases / "trainer-1", bases / "served")
    with running_fleet(f"tied-{uuid4().hex[:12]}", tmp_path, [bases / "served"]) as fleet:
        fleet.checkpoints[1:] = checkpoints[1:]
        await save_blocks(fleet)
        for version in (1, 2):
            model = write_checkpoint(fleet, version, write, tie_word_embeddings=True)
            report = await run(fleet, version)
            del model[HEAD]
            assert_served(fleet, report, model)
    assert report.snapshot.kind is SnapshotKind.DELTA


async def test_two_names_of_one_tensor_are_both_served_where_the_config_unties_them(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    def write(directory: Path, model: Model) -> None:
        with_aliases(directory, tied(model))

    model = save(1, write)
    assert_served(fleet, await run(fleet, 1), tied(model))


async def test_what_a_trainer_leaves_beside_it_changes_nothing(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    for version in (1, 2):
        model = save(version, in_files(2))
        directory = fleet.root / f"trainer-{version}"
        for name in ("optimizer.pt", "latest", "random_states_0.pkl", "trainer_state.json"):
            (directory / name).write_text(f"of step {version}")
        (directory / "global_step1").mkdir()
        (directory / "model-00003-of-00007.safetensors").write_bytes(b"half of an older one")
        report = await run(fleet, version)
        assert_served(fleet, report, model)
    assert report.snapshot.kind is SnapshotKind.DELTA
    assert any("optimizer.pt" in warning for warning in report.snapshot.warnings)


async def test_the_served_layout_is_published_file_by_file_as_it_is(fleet: Fleet) -> None:
    report = await checkpoint_to_rollout(fleet.spec(1))
    files = {path.name: sha256_file(path) for path in fleet.checkpoints[1].iterdir()}
    assert report.content_sha256 == content_sha256(files)
    stored = fleet.bucket / report.snapshot.identity
    assert {path.name: sha256_file(path) for path in stored.iterdir()} == files


async def test_a_killed_publication_goes_on_where_it_was(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    save(1, in_files(2))
    await run(fleet, 1)
    model = save(2, in_files(3))
    spec = fleet.spec(2, checkpoint=str(fleet.root / "trainer-2"))
    for pattern in ("deltas/run-000002-*/*", "../../../bucket/run-000002-*/*"):
        process = CycleProcess(fleet, spec)
        root = fleet.root / "work" / "local" / "rollouts"

        def has_come(_: CycleProcess, root: Path = root, pattern: str = pattern) -> bool:
            return any(root.glob(pattern))

        if process.reaches(has_come):
            process.kill()
    process = CycleProcess(fleet, spec)
    process.finish()
    (report,) = (one for one in fleet.reports() if one.policy_version == 2)
    assert report.snapshot.kind is SnapshotKind.DELTA
    assert_served(fleet, report, model)


def index_of(weight_map: Mapping[str, str]) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def lie_about(change: Callable[[dict[str, str]], None]) -> Writer:
    """A writer whose index is changed afterwards."""

    def write(directory: Path, model: Model) -> None:
        in_files(2)(directory, model)
        weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
        change(weight_map)
        (directory / INDEX_FILE).write_text(index_of(weight_map))

    return write


def move(weight_map: dict[str, str]) -> None:
    weight_map[HEAD] = weight_map[EMBEDDINGS]


LIES: Iterable[Any] = [
    pytest.param(lie_about(lambda weights: weights.update(x="gone.safetensors")), "missing_shard"),
    pytest.param(lie_about(lambda weights: weights.update(x="../a.safetensors")), "file_name"),
    pytest.param(lie_about(move), "missing_tensor"),
    pytest.param(lie_about(lambda weights: weights.pop(HEAD)), "unindexed_tensor"),
    pytest.param(lie_about(lambda weights: weights.clear()), "empty_index"),
]


@pytest.mark.parametrize(("write", "rule"), LIES)
async def test_an_index_that_lies_is_refused(
    fleet: Fleet, save: Callable[..., Model], write: Writer, rule: str
) -> None:
    save(1, write)
    with pytest.raises(InvalidCheckpointError, match=rule):
        await run(fleet, 1)
    assert not list(fleet.bucket.glob("run-*"))
    assert fleet.log()["signals"] == []


async def test_a_head_that_is_tied_and_no_copy_is_refused(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    def write(directory: Path, model: Model) -> None:
        embeddings = model[EMBEDDINGS]
        other = embeddings._replace(data=embeddings.data[:-1] + b"\7")
        in_files(2)(directory, {**model, HEAD: other})

    save(1, write, tie_word_embeddings=True)
    with pytest.raises(InvalidCheckpointError, match="tied_head"):
        await run(fleet, 1)
    assert not list(fleet.bucket.glob("run-*"))


async def test_a_shard_replaced_while_it_is_read_is_never_signalled(
    fleet: Fleet, save: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotload.clients.store.local_directory import LocalDirectory

    save(1, in_files(2))
    put = LocalDirectory.put_file
    shard = fleet.root / "trainer-1" / "model-00002-of-00002.safetensors"

    async def replace_then_put(directory: Any, local: Any, path: str) -> None:
        data = shard.read_bytes()
        shard.with_suffix(".new").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        shard.with_suffix(".new").replace(shard)
        await put(directory, local, path)

    monkeypatch.setattr(LocalDirectory, "put_file", replace_then_put)
    with pytest.raises(InvalidCheckpointError, match="changed_while_read"):
        await run(fleet, 1)
    assert fleet.log()["signals"] == []
    assert fleet.served() == {None}


async def test_an_adapter_as_peft_writes_it_is_published_as_it_is(
    fleet: Fleet, save: Callable[..., Model]
) -> None:
    save(1, in_one_file)
    await run(fleet, 1)
    directory = fleet.root / "trainer-2"
    directory.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = 4 * 2 * 128
    adapter = {
        f"{stem}.lora_A.weight": Tensor("F32", (2, 128), bytes(rows)),
        f"{stem}.lora_B.weight": Tensor("F32", (128, 2), bytes(rows)),
    }
    write_shard(directory / "adapter_model.safetensors", adapter)
    base = f"accounts/fireworks/models/{fleet.checkpoints[0].name}"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "README.md").write_text("made by peft")
    (directory / "optimizer.pt").write_bytes(b"state")
    report = await run(fleet, 2)
    assert report.snapshot.kind is SnapshotKind.LORA
    stored = {path.name for path in (fleet.bucket / report.snapshot.identity).iterdir()}
    assert stored == {"adapter_model.safetensors", "adapter_config.json"}
    assert fleet.log()["client_bugs"] == []
