"""A training run's figures in the real client of Weights & Biases, which is kept offline."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from hotload.clients.metrics.send import open_wandb
from hotload.spec import CycleSpec

pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="needs the package wandb")
KEY = "0123456789" * 4


def test_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    cycle = {"run_id": "run", "policy_version": 3, "checkpoint": "/c", "work_dir": "/w"}
    problems = {"dataset": "/problems.jsonl"}
    spec = CycleSpec.model_validate({**cycle, "problems": problems, "wandb": {"entity": "acme"}})
    told = [asyncio.run(logged(spec, steps)) for steps in ([1, 2], [3])]
    assert told == [None, None]
    found = {
        path: steps_of(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    }
    assert {path.name for path in found} == {"run-run~training.wandb"}
    assert sorted(found.values()) == [[(1, 0.25), (2, 0.5)], [(3, 0.75)]]
    assert KEY not in "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


async def logged(spec: CycleSpec, steps: list[int]) -> str | None:
    log = await open_wandb(spec, "training")
    assert log is not None
    for step in steps:
        assert await log.log({"rollout/raw_reward": step / 4}, step) is None
    return await log.close()


def steps_of(path: Path) -> list[tuple[int, float]]:
    """The steps and rewards that a file of the client's has."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in records_of(path.read_bytes()):
        history = Record.FromString(data).history
        items = {one.key or one.nested_key[0]: one.value_json for one in history.item}
        if "_step" in items:
            found.append((int(items["_step"]), json.loads(items["rollout/raw_reward"])))
    return found


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB has them, after a head of 7 bytes: CRC, size, kind, bytes; in
    blocks of 32 KiB, over which a record may go in parts."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""
