"""A hot-load door with other names and no control plane (protocol §22): our clients against it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from emulator.control.settings import EmulatorConfig
from emulator.server import RunningEmulator
from examples.tiny_trainer import TinyTrainer
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.service import HotLoadClient
from hotload.errors import ServiceRefusedError, SnapshotRejectedError
from hotload.identity import SnapshotKind
from hotload.options import Sampling
from hotload.rollout.trajectory import Problem, Weights
from tests.factories import snapshot_manifest
from tests.waiting import PATIENCE_SECONDS, until

KEY = "key-that-must-not-be-shown"
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
SIGNAL = "/hot_load/v1/models/hot_load"


@pytest.fixture
def door(
    tmp_path: Path, emulators: Callable[[EmulatorConfig], RunningEmulator]
) -> Iterator[RunningEmulator]:
    """An emulator with a plain door; its bucket holds its base model as snapshot id-1."""
    base, bucket = tmp_path / "base", tmp_path / "bucket"
    TinyTrainer().save(base)
    shutil.copytree(base, bucket / "id-1")
    config = EmulatorConfig(
        bucket=bucket.as_uri(),
        base_model=base,
        replica_count=2,
        api_key=KEY,
        dialect="plain",
        **NAMES,  # type: ignore[arg-type]
    )
    with emulators(config) as running:
        yield running


def access(door: RunningEmulator, **changes: Any) -> Access:
    return Access(**{"base_url": door.url, "api_key": KEY, "dialect": "plain", **NAMES, **changes})


async def test_the_documents_pass_the_dialect_on(door: RunningEmulator) -> None:
    account = InferenceAccount(base_url=door.url, api_key=KEY, dialect="plain", **NAMES)
    assert HotLoadService(account=account).open().access == access(door)
    assert RolloutClient(account=account).open().access == access(door)


async def test_a_snapshot_is_signalled_and_served(door: RunningEmulator) -> None:
    service = HotLoadClient(access(door))
    await service.signal(snapshot_manifest("id-1"))

    async def served() -> bool:
        return (await service.observe()).is_served_everywhere("id-1")

    assert await until(served)


async def test_the_check_asks_for_no_description(door: RunningEmulator) -> None:
    service = HotLoadClient(access(door))
    assert await service.describe() is None
    lines = await service.check("s3://elsewhere")
    assert [(line.name, line.ok) for line in lines] == [
        ("key", True),
        ("status", True),
        ("description", True),
    ]
    assert "replica_count" in lines[2].found
    with pytest.raises(ServiceRefusedError, match="no ledger"):
        await service.reset_ledger()


async def test_samples_come_from_below_no_prefix(door: RunningEmulator) -> None:
    client = InferenceClient(access(door))
    [line] = await client.check()
    assert line.ok, line
    sampling = Sampling(max_completion_tokens=4)
    async with client.session(sampling, identity="id-1", policy_version=0) as sampler:
        for prompt in ({"prompt": (1, 2, 3)}, {"messages": [{"role": "user", "content": "1"}]}):
            sample = await sampler.sample(Problem("p", answer="", **prompt), 0)  # type: ignore[arg-type]
            assert (sample.failure, sample.weights) == (None, Weights.ASSUMED)  # of base weights


async def test_the_other_dialect_is_refused_by_name(door: RunningEmulator) -> None:
    vendor = HotLoadClient(access(door, dialect="fireworks"))
    with pytest.raises(ServiceRefusedError, match="HTTP 404"):
        await vendor.describe()
    with pytest.raises(ServiceRefusedError, match="Provider-Model header does not match"):
        await vendor.observe()
    wrong = HotLoadClient(access(door, deployment_id="elsewhere"))
    with pytest.raises(ServiceRefusedError, match="Provider-Deployment header does not match"):
        await wrong.observe()


@pytest.mark.parametrize(
    "changes",
    [
        {"reset_prompt_cache": "none"},
        {"extra_fields_ignore": ("x",)},
        {"hint_body_template": {"file": "{file}"}},
    ],
)
def test_what_the_door_does_not_take_is_refused_before_anything_is_uploaded(
    door: RunningEmulator, changes: dict[str, Any]
) -> None:
    (name,) = changes
    with pytest.raises(ServiceRefusedError, match=f"{name}: found .* cannot be told"):
        HotLoadClient(access(door), **changes)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"reset_prompt_cache": "none"}, "reset_prompt_cache"),
        ({"validation": {}}, "validation"),
    ],
)
def test_the_door_itself_takes_no_more(
    door: RunningEmulator, body: dict[str, Any], told: str
) -> None:
    answer = signalled(door, {"identity": "id-1", **body})
    assert (answer.status_code, told in answer.text) == (400, True)


def signalled(door: RunningEmulator, body: object) -> httpx.Response:
    headers = {
        "authorization": f"Bearer {KEY}",
        "provider-model": "policy",
        "provider-deployment": "rollouts",
    }
    return httpx.post(door.url + SIGNAL, json=body, headers=headers, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ({"compression_format": "arc_v2"}, "compression_format"),
        ({"checksum_format": "alder32"}, "checksum_format"),
    ],
)
def test_the_door_knows_formats_by_their_common_names(
    door: RunningEmulator, formats: dict[str, str], told: str
) -> None:
    metadata = {"previous_snapshot_identity": "id-1", **formats}
    answer = signalled(door, {"identity": "id-2", "incremental_snapshot_metadata": metadata})
    assert answer.status_code == 400
    assert f"unsupported {told}" in answer.text


async def test_a_delta_is_named_in_the_door_s_words(door: RunningEmulator) -> None:
    service = HotLoadClient(access(door))
    delta = snapshot_manifest("id-2", kind=SnapshotKind.DELTA, previous="id-0")
    with pytest.raises(SnapshotRejectedError, match="not in the ledger"):  # its formats passed
        await service.signal(delta)
