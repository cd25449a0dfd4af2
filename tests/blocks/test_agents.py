"""A service whose agents are asked without a door, where none of them answers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from flows.cycle_file import parse_cycle_file
from hotload.errors import ServiceUnavailableError
from tests.factories import snapshot_manifest

NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
CYCLE = """
blocks:
  account: {{account_id: local, model_id: policy, deployment_id: rollouts}}
  store: {{url: "{bucket}"}}
  service: {{agents: ["{agent}"], quorum: 0.5}}
cycle: {{checkpoint: /x, run_id: own, policy_version: 1, work_dir: /w, problems: {{dataset: /y}}}}
"""


def declared(tmp_path: Path) -> HotLoadService:
    file = tmp_path / "cycle.yaml"
    agent = "http://127.0.0.1:1"
    file.write_text(CYCLE.format(bucket=tmp_path.as_uri(), agent=agent))
    _, blocks = parse_cycle_file(file)
    service = blocks["service"]
    assert isinstance(service, HotLoadService)
    assert service.store is not None
    assert service.store.url == tmp_path.as_uri()
    return service


@pytest.mark.parametrize("is_pickled", [False, True])
async def test_agents_that_do_not_answer_are_told(tmp_path: Path, is_pickled: bool) -> None:
    client = declared(tmp_path).open()
    client = pickle.loads(pickle.dumps(client)) if is_pickled else client

    (replica,) = (await client.observe()).replicas
    assert not replica.readiness
    with pytest.raises(ServiceUnavailableError, match="0 of 1 agents can be relied on") as caught:
        await client.signal(snapshot_manifest("one"))
    assert "ConnectError" in str(caught.value)
    found = {line.name: line for line in await client.check(tmp_path.as_uri())}
    assert found["status"].found == "base weights on 1 (1 not ready)"
    assert found["bucket"].ok
    found = {line.name: line for line in await client.check("file:///elsewhere")}
    assert not found["bucket"].ok


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"store": None}, "they follow a store; name it in `store`"),
        ({"agents": ("a:1", "b:1")}, "found the names a:1, b:1, expected one of them"),
        *(
            ({"agents": (name,)}, f"{name}: expected HOST:PORT")
            for name in ("agents.local", "8700", ":8700", "agents.local:70000")
        ),
        ({"agents": ("ftp://a:1",)}, "expected an http or https address"),
        ({"quorum": 0}, "greater than 0"),
        ({"agents": (), "quorum": 0.5}, "quorum: it is of agents"),
        (
            {"account": InferenceAccount(**NAMES, base_url="http://x", dialect="plain")},
            "the account's dialect is of a door, and none is asked",
        ),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    declared: dict[str, Any] = {
        "account": InferenceAccount(**NAMES),
        "agents": ("http://127.0.0.1:1",),
        "store": CheckpointStore(url=tmp_path.as_uri()),
    }
    with pytest.raises(ValidationError, match=told):
        HotLoadService(**declared | changes)
