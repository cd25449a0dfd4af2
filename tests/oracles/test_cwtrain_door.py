"""CoreWeave's own client at the emulator's door (protocol §23), and its words beside ours.

OURS is the interpreter that has this project; the client, its loader and a moto server are others'.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from cwtrain.errors import (
    FailedPreconditionError,
    HotLoadInProgressError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnimplementedError,
)
from cwtrain.hotload import HotLoader
from cwtrain.hotload.delta import write_delta
from cwtrain.hotload.errors import HotLoadFailedError
from cwtrain.infra import client as vendor
from cwtrain.infra import models
from cwtrain.infra.client import InferenceClient

from hotload.publish.doors import coreweave
from hotload.publish.doors.api_dialect import API_DIALECTS
from tests.servers import ROOT, SHEPHERD
from tests.waiting import PATIENCE_SECONDS, wait_until

OURS = str(ROOT / os.environ.get("OURS", ".venv/bin/python"))
KEY, DEPLOYMENT, BUCKET = "right", "rollouts", "policies"
TRAIN = """
import sys
from pathlib import Path
from examples.tiny_trainer import TinyTrainer

trainer = TinyTrainer()
for version in range(4):
    trainer.save(Path(sys.argv[1]) / f"{version:06d}")
    trainer.step()
"""
Start = Callable[..., HotLoader]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([OURS, "-c", TRAIN, str(directory)], cwd=ROOT, check=True)
    return sorted(directory.iterdir())


def run_beside(stack: ExitStack, command: list[str]) -> subprocess.Popen[str]:
    """Start a process whose group ends with the stack, however this one ends."""
    child = subprocess.Popen(
        ["sh", "-c", SHEPHERD, "sh", *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    stack.callback(child.wait)
    stack.callback(child.stdin.close)
    stack.callback(child.stdout.close)
    return child


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A client of an S3 server with one bucket."""
    with ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run_beside(stack, [OURS, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        stack.callback(client.close)

        def answers() -> bool:
            with suppress(EndpointConnectionError):
                client.create_bucket(Bucket=BUCKET)
                return True
            return False

        wait_until(answers)
        yield client


@pytest.fixture
def start(s3: Any, checkpoints: list[Path], request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts emulators, each with a prefix of its own in the bucket, and opens its loader."""
    with ExitStack() as stack:

        def begin(*options: str, token: str = KEY) -> HotLoader:
            url = f"s3://{BUCKET}/{request.node.name}"
            command = [OURS, "-m", "emulator", "--dialect", "coreweave", "--bucket", url]
            for pair in (f"endpoint_url={s3.meta.endpoint_url}", "key=test", "secret=test"):
                command += ["--bucket-option", pair]
            command += ["--base-model", str(checkpoints[0]), "--api-key", KEY, "--replicas", "2"]
            first = run_beside(stack, [*command, *options]).stdout.readline()
            assert first.startswith("emulator: http"), first
            client = InferenceClient(token, base_url=first.split()[1], max_retries=1)
            stack.callback(client.close)
            return HotLoader(
                client, DEPLOYMENT, s3=s3, poll_interval=0.05, timeout=PATIENCE_SECONDS
            )

        yield begin


def test_its_loader_publishes_a_full_its_own_delta_and_ours(
    start: Start, checkpoints: list[Path], tmp_path: Path
) -> None:
    loader = start()
    assert loader.wait_for_deployment_ready().hot_load_enabled
    assert loader.current_identity() == "initial"
    assert loader.check_snapshot_access().endswith("/")
    full = loader.publish(checkpoints[1], "step-1")
    assert len(loader.verify_served(full.id, "step-1")) == 2

    write_delta(checkpoints[1], checkpoints[2], tmp_path / "theirs", version="2", base_version="1")
    theirs = loader.publish(tmp_path / "theirs", "step-2", previous_identity="step-1")
    assert len(loader.verify_served(theirs.id, "step-2")) == 2

    encode = [OURS, "-m", "hotload", "encode", *checkpoints[2:4], tmp_path / "ours"]
    lineage = ["--dialect", "coreweave", "--identity", "step-3", "--previous", "step-2"]
    subprocess.run([*encode, *lineage], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    ours = loader.publish(tmp_path / "ours", "step-3", previous_identity="step-2")
    assert len(loader.verify_served(ours.id, "step-3")) == 2

    assert loader.current_identity() == "step-3"
    client = loader.client
    loads = [*client.list_hot_loads(DEPLOYMENT, page_size=1)]
    assert [one.identity for one in loads] == ["step-3", "step-2", "step-1"]
    assert loads[0].spec.incremental_snapshot_metadata.previous_snapshot_identity == "step-2"
    assert len(client.list_hot_load_replicas(ours.id, page_size=1)) == 2
    assert loader.completed_hot_load("step-1").id == full.id
    assert loader.active_hot_load() is None
    assert [one.id for one in client.list_deployments()] == [DEPLOYMENT]


def test_its_client_knows_every_refusal(start: Start, checkpoints: list[Path]) -> None:
    loader = start()
    client = loader.client
    loader.upload(checkpoints[1], "step-1")
    loader.upload(checkpoints[2], "step-2")
    with pytest.raises(FailedPreconditionError, match="not in the bucket"):
        client.create_hot_load(DEPLOYMENT, "step-9")
    with pytest.raises(FailedPreconditionError, match="not in the ledger"):
        loader.trigger("step-2", previous_identity="step-1")
    with pytest.raises(InvalidArgumentError, match="identity"):
        client.create_hot_load(DEPLOYMENT, "_hidden")
    with pytest.raises(NotFoundError, match="deployment not found"):
        client.create_hot_load("elsewhere", "step-1")
    with pytest.raises(NotFoundError, match="hot-load not found"):
        client.get_hot_load("nothing")
    begun = client.create_hot_load(DEPLOYMENT, "step-1", hot_load_id="one")
    assert client.create_hot_load(DEPLOYMENT, "step-1", hot_load_id="one").id == begun.id == "one"
    loader.wait("one")
    with pytest.raises(UnimplementedError):
        client.cancel_hot_load("one")
    with pytest.raises(FailedPreconditionError, match="loads no snapshot twice"):
        loader.rollback("step-1")
    with (
        InferenceClient("wrong", base_url=client.base_url) as stranger,
        pytest.raises(UnauthenticatedError),
    ):
        stranger.get_deployment(DEPLOYMENT)


def test_one_load_goes_on_at_a_time_and_the_next_waits_for_it(
    start: Start, checkpoints: list[Path]
) -> None:
    loader = start("--seconds-per-state", "0.5")
    for number in (1, 2):
        loader.upload(checkpoints[number], f"step-{number}")
    loader.trigger("step-1")
    with pytest.raises(HotLoadInProgressError):
        loader.trigger("step-2", wait_for_active=False)
    second = loader.wait(loader.trigger("step-2").id)
    assert len(loader.verify_served(second.id, "step-2")) == 2


def test_a_replica_that_fails_ends_the_load_with_its_reason(
    start: Start, checkpoints: list[Path], tmp_path: Path
) -> None:
    loader = start()
    loader.publish(checkpoints[1], "step-1")
    write_delta(checkpoints[1], checkpoints[2], tmp_path / "delta", version="2", base_version="1")
    fault = json.dumps({"fault": "torn_apply", "replica": "replica-1", "count": 1}).encode()
    urllib.request.urlopen(f"{loader.client.base_url}/emulator/faults", fault).close()
    with pytest.raises(HotLoadFailedError, match=r"replica-1: .*torn"):
        loader.publish(tmp_path / "delta", "step-2", previous_identity="step-1")
    full = loader.publish(checkpoints[2], "step-2b")
    assert len(loader.verify_served(full.id, "step-2b")) == 2


def test_our_words_are_its_words() -> None:
    def names(kind: type[models.ProtoEnum]) -> tuple[str, ...]:
        return tuple(one.name for one in kind)

    assert names(models.HotLoadState) == coreweave.LOAD_STATES
    assert names(models.ReplicaState) == coreweave.REPLICA_STATES
    assert names(models.ResourceStatus) == coreweave.DEPLOYMENT_STATES
    assert {policy.wire for policy in models.PromptCachePolicy if policy} == {
        *coreweave.PROMPT_CACHE.values()
    }
    assert vendor.API_PREFIX == coreweave.API_PREFIX
    spelled, dialect = (
        models.IncrementalSnapshotMetadata("step-1").to_json(),
        API_DIALECTS["coreweave"],
    )
    assert spelled == {"previousSnapshotIdentity": "step-1", **dialect.formats}
    assert (dialect.base_url, dialect.key_variable) == (
        vendor.DEFAULT_BASE_URL,
        vendor.TOKEN_ENV_VAR,
    )
