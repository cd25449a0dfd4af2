"""Signals, loads, chains: what replicas hold is what was published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator.engine.decoding import log_softmax
from emulator.engine.weights import load_llama

PROMPT = [5, 9, 200, 31, 7]
Start = Callable[..., Any]


def logprobs(checkpoint: Path, adapter: Path | None = None) -> list[float]:
    """Log-probability of every prompt token after the first, computed apart from the service."""
    weights = load_llama(checkpoint, adapter)
    logits = weights.forward(PROMPT, weights.empty_cache(), all_positions=True)
    rows = [log_softmax(row.astype(np.float64)) for row in logits]
    return [float(row[token]) for row, token in zip(rows, PROMPT[1:], strict=False)]


def answered(caller: Any, **headers: str) -> list[float]:
    """The same, as a replica answers it."""
    answer = caller.complete(prompt=PROMPT, echo=True, logprobs=True, max_tokens=0, headers=headers)
    assert answer.status_code == 200, answer.text
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == PROMPT
    return [entry["logprob"] for entry in content][1:]


def test_every_replica_answers_with_the_weights_it_holds(start: Start, publisher: Any) -> None:
    caller = start(replica_count=3)
    assert caller.served() == [None] * 3
    assert answered(caller) == pytest.approx(logprobs(publisher.base), abs=1e-5)

    publisher.full("run-1")
    caller.load("run-1")
    publisher.delta("run-2", "run-1")
    caller.load("run-2", "run-1")
    publisher.delta("run-3", "run-2", seed=5)
    caller.load("run-3", "run-2")

    assert caller.served() == ["run-3"] * 3
    assert caller.stages() == ["completed"] * 3
    expected = logprobs(publisher.checkpoint("run-3"))
    assert expected != pytest.approx(logprobs(publisher.checkpoint("run-2")), abs=1e-3)
    for turn in range(3):
        found = answered(caller, **{"x-session-affinity": f"session {turn}"})
        assert found == pytest.approx(expected, abs=1e-5)
    replicas = {request["replica"] for request in caller.log()["requests"][1:]}
    assert replicas == {"replica-0", "replica-1", "replica-2"}
    chain = [("run-1", "applied"), ("run-2", "applied"), ("run-3", "applied")]
    assert caller.applied() == {f"replica-{i}": chain for i in range(3)}


def test_held_bytes_equal_the_checkpoint(start: Start, publisher: Any, tmp_path: Path) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    caller.load("a")
    publisher.delta("b", "a")
    caller.load("b", "a")
    (held,) = (tmp_path / "work").glob("emulator-*/replica-0/held/*")
    expected = {path.name: path.read_bytes() for path in publisher.checkpoint("b").iterdir()}
    assert {path.name: path.read_bytes() for path in held.iterdir()} == expected
    caller.running.stop()
    assert not list((tmp_path / "work").iterdir())


def test_the_same_body_again_is_no_second_apply(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.load("b", "a")
    caller.load("b", "a")
    assert caller.applied()["replica-0"] == [("a", "applied"), ("b", "applied")]
    answer = caller.signal("b")
    assert answer.status_code == 400
    assert "other metadata" in answer.text


def test_replicas_converge_one_after_the_other(start: Start, publisher: Any) -> None:
    caller = start(clock="ticks", seconds_per_state=1.0)
    publisher.full("a")
    caller.load("a")
    assert caller.stages() == ["pending", "pending"]
    caller.tick(1.0)
    assert caller.stages() == ["downloading", "pending"]
    assert caller.served() == [None, None]  # the old weights answer meanwhile
    caller.tick(1.0)
    assert caller.served() == ["not ready", None]
    caller.tick(1.0)
    assert caller.served() == ["a", "not ready"]
    answer = caller.signal("b")
    assert (answer.status_code, "'a' is being loaded" in answer.text) == (400, True)
    caller.tick(1.5)
    assert caller.served() == ["a", "a"]


@pytest.mark.parametrize("status", ["400", "409"])
def test_a_delta_needs_a_parent_that_is_served(start: Start, publisher: Any, status: str) -> None:
    caller = start(chain_error=status)
    publisher.full("a")
    publisher.delta("b", "a")
    publisher.delta("c", "b")
    answer = caller.signal("b", "a")
    assert (answer.status_code, "not in the ledger" in answer.text) == (int(status), True)
    caller.load("a")
    assert caller.signal("c", "b").status_code == int(status)
    caller.load("b", "a")
    publisher.delta("d", "a", seed=9)
    answer = caller.signal("d", "a")
    assert (answer.status_code, "not the snapshot being served" in answer.text) == (
        int(status),
        True,
    )
    assert caller.served() == ["b", "b"]


def test_chain_errors_may_show_as_a_failed_load(start: Start, publisher: Any) -> None:
    caller = start(chain_error="load_error")
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("b", "a")
    states = [each["loading_state"] for each in caller.replicas()]
    assert states == [{"stage": "error", "target_snapshot_identity": "b"}] * 2
    assert caller.served() == [None, None]


def test_a_wrong_base_is_refused_and_a_full_recovers(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    publisher.full("x", seed=8)
    out = publisher.delta("b", "x")  # encoded against other bytes than are served
    caller.load("a")
    caller.load("b", "a")
    state = caller.replicas()[0]
    assert state["loading_state"] == {"stage": "error", "target_snapshot_identity": "b"}
    assert (state["readiness"], state["current_snapshot_identity"]) == (True, "a")
    assert answered(caller) == pytest.approx(logprobs(publisher.checkpoint("a")), abs=1e-5)
    assert "Checksum" in caller.log()["snapshots"]["replica-0"][-1]["detail"]
    assert out.exists()
    publisher.delta("c", "a", seed=4)  # right, but the base is torn
    caller.load("c", "a")
    assert caller.stages() == ["error"]
    assert "torn" in caller.log()["snapshots"]["replica-0"][-1]["detail"]
    publisher.full("d", seed=6)
    caller.load("d")
    assert caller.served() == ["d"]
    publisher.delta("e", "d")
    caller.load("e", "d")
    assert caller.served() == ["e"]


def test_a_delta_with_another_index_is_refused(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    out = publisher.delta("b", "a")
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    caller.load("a")
    caller.load("b", "a")
    assert caller.stages() == ["error"]


def test_a_late_joiner_and_a_restart_replay_the_chain(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1, clock="ticks", seconds_per_state=1.0)
    publisher.full("a")
    publisher.delta("b", "a")
    for identity, previous in (("a", None), ("b", "a")):
        caller.load(identity, previous)
        caller.tick(10)
    answer = caller.http.post("/emulator/replicas", json={"action": "add"})
    assert answer.json() == {"replica": "replica-1"}
    caller.tick()
    assert caller.served() == ["b", "not ready"]
    caller.tick(100)
    assert caller.served() == ["b", "b"]
    assert caller.applied()["replica-1"] == [("a", "replayed"), ("b", "replayed")]
    answer = caller.http.post("/emulator/replicas", json={"action": "restart", "replica": 0})
    assert answer.json() == {"replica": "replica-0"}
    caller.tick(0)
    assert caller.served() == ["not ready", "b"]
    caller.tick(100)
    assert caller.served() == ["b", "b"]
    expected = logprobs(publisher.checkpoint("b"))
    for turn in range(2):
        found = answered(caller, **{"x-multi-turn-session-id": f"s{turn}"})
        assert found == pytest.approx(expected, abs=1e-5)
    caller.http.post("/emulator/replicas", json={"action": "remove", "replica": "replica-0"})
    assert caller.served() == ["b"]
    publisher.delta("c", "b")
    caller.load("c", "b")
    caller.tick(100)
    assert caller.served() == ["c"]


def test_a_restart_in_the_middle_of_a_load_ends_on_its_target(start: Start, publisher: Any) -> None:
    caller = start(replica_count=2, clock="ticks", seconds_per_state=1.0)
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    caller.tick(100)
    caller.load("b", "a")
    caller.tick(2)
    caller.http.post("/emulator/replicas", json={"action": "restart", "replica": 1})
    caller.tick(100)
    assert caller.served() == ["b", "b"]
    assert caller.applied()["replica-1"][1:] == [("a", "replayed"), ("b", "replayed")]


def test_a_ledger_reset_serves_base_weights_and_needs_a_full(start: Start, publisher: Any) -> None:
    caller = start()
    publisher.full("a")
    publisher.delta("b", "a")
    caller.load("a")
    path = f"/v1/{caller.config.deployment}/ledger"
    entries = caller.http.get(path).json()["entries"]
    assert [(entry["identity"], entry["kind"]) for entry in entries] == [("a", "full")]
    assert [each["replica"] for each in entries[0]["replicas"]] == ["replica-0", "replica-1"]
    answer = caller.http.delete(path)
    assert (answer.status_code, answer.json()) == (200, {})
    assert caller.served() == [None, None]
    assert answered(caller) == pytest.approx(logprobs(publisher.base), abs=1e-5)
    assert caller.http.get(path).json() == {"entries": []}
    assert caller.signal("b", "a").status_code == 400
    publisher.full("c")
    caller.load("c")
    assert caller.served() == ["c", "c"]


def test_a_signal_before_any_replica_is_a_client_bug(start: Start, publisher: Any) -> None:
    caller = start(clock="ticks", startup_seconds=5.0)
    publisher.full("a")
    assert caller.replicas() == []
    assert caller.complete().status_code == 503
    assert "DEPLOYMENT_SCALING_UP" in caller.complete().text
    assert caller.signal("a").status_code == 200
    assert len(caller.log()["client_bugs"]) == 1
    caller.tick(5)
    assert caller.served() == [None, None]
    caller.load("a")
    assert caller.served() == ["a", "a"]


def test_lora_is_loaded_beside_what_is_served(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.full("a")
    caller.load("a")
    adapter = publisher.lora("l-1")
    caller.load("l-1")
    (replica,) = caller.replicas()
    assert replica["current_snapshot_identity"] == "a"
    assert replica["loaded_adapters"] == [{"identity": "l-1", "status": "loaded"}]
    expected = logprobs(publisher.checkpoint("a"), adapter)
    assert expected != pytest.approx(logprobs(publisher.checkpoint("a")), abs=1e-3)
    assert answered(caller) == pytest.approx(expected, abs=1e-5)
    assert caller.complete().json()["model"].endswith("@l-1")
    caller.http.post("/emulator/replicas", json={"action": "restart", "replica": 0})
    caller.tick()
    assert answered(caller) == pytest.approx(expected, abs=1e-5)


def test_lora_must_name_the_base_and_bring_safetensors(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    publisher.lora("other", named="another-model")
    answer = caller.signal("other")
    assert (answer.status_code, "not the served base model" in answer.text) == (400, True)
    out = publisher.lora("pickled")
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    answer = caller.signal("pickled")
    assert (answer.status_code, "pickle" in answer.text) == (400, True)
    out = publisher.lora("misfit")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"r": 0}))
    caller.load("misfit")
    (replica,) = caller.replicas()
    assert replica["loaded_adapters"] == [{"identity": "misfit", "status": "failed"}]
    publisher.lora("fine")
    publisher.full("a")
    caller.load("a")
    caller.load("fine", "a")
    assert "delta metadata" in caller.log()["client_bugs"][0]


def test_hints_are_recorded_and_pre_staged(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    out = publisher.full("a")
    path = "/hot_load/v1/models/hot_load/hint"
    body = {"identity": "a", "file": "norm.safetensors", "anything": 1}
    for hint in (body, {"identity": "../a", "file": "x"}, {"identity": "a", "file": "no"}, {}):
        answer = caller.http.post(path, json=hint)
        assert (answer.status_code, answer.json()) == (200, {})
    hints = caller.log()["hints"]
    assert [hint["prestaged"] for hint in hints] == [True, False, False, False]
    assert hints[0]["body"] == body
    number = caller.fault("corrupt_object", file="norm.safetensors", offset=0, count=1)
    caller.load("a")  # the hinted copy is taken, and corrupted on its way
    assert caller.stages() == ["error"]
    assert number == 1
    assert out.exists()


@pytest.mark.parametrize("code", [400, 404, 500])
def test_hints_may_be_unknown(start: Start, code: int) -> None:
    caller = start(replica_count=1, hint_status_code=code)
    answer = caller.http.post("/hot_load/v1/models/hot_load/hint", json={})
    assert (answer.status_code, "error" in answer.json()) == (code, True)


def config_change(**change: Any) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        path = out / "config.json"
        config = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).unlink()


def spec_change(out: Path) -> None:
    path = out / "model.weight.spec.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float16"', 1))


def stray(out: Path) -> None:
    shutil.copyfile(out / "norm.safetensors", out / "stray.safetensors")


def truncate(out: Path) -> None:
    path = out / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (config_change(rope_theta=None), "Extra base model config options: ['rope_theta']"),
        (config_change(extra=1), "Extra snapshot model config options: ['extra']"),
        (config_change(rope_theta=5.0), "Config value mismatch for rope_theta"),
        (config_change(rope_theta="5"), "Types mismatch for rope_theta"),
        (remove("model.weight.spec.json"), "model.weight.spec.json is missing"),
        (remove("model.safetensors.index.json"), "model.safetensors.index.json is missing"),
        (remove("norm.safetensors"), "norm.safetensors is listed"),
        (spec_change, "dtype differs"),
        (stray, "stray.safetensors: not listed"),
        (truncate, "head.safetensors"),
        (shutil.rmtree, "not in the bucket"),
    ],
)
def test_a_full_that_does_not_validate_is_refused_in_the_signal(
    start: Start, publisher: Any, spoil: Callable[[Path], None], told: str
) -> None:
    caller = start(replica_count=1)
    spoil(publisher.full("a"))
    answer = caller.signal("a")
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert caller.served() == [None]
    publisher.full("b")
    caller.load("b")  # and the service goes on
    assert caller.served() == ["b"]


def test_ignored_config_fields_are_not_compared(start: Start, publisher: Any) -> None:
    caller = start(replica_count=1)
    config_change(extra=1, rms_norm_eps=0.5, quantization_config={"quant_method": "x"})(
        publisher.full("a")
    )
    ignored = {"extra_fields_ignore": ["extra", "rms_norm_eps"]}
    caller.load("a", validation=ignored)
    assert caller.served() == ["a"]


@pytest.mark.server
@pytest.mark.parametrize("server", ["s3_server", "gcs_server"])
def test_a_bucket_behind_a_real_server(
    start: Start, publisher: Any, request: pytest.FixtureRequest, server: str
) -> None:
    from fsspec.core import url_to_fs

    store = request.getfixturevalue(server)
    store_fs, root = url_to_fs(store.url, **store.options)
    caller = start(
        bucket=f"{store.url}/below/", bucket_options=dict(store.options), replica_count=1
    )
    assert caller.signal("a").status_code == 400  # nothing there yet
    publisher.full("a")
    publisher.delta("b", "a")
    for identity, previous in (("a", None), ("b", "a")):
        for path in (publisher.bucket / identity).iterdir():
            store_fs.pipe_file(f"{root}/below/{identity}/{path.name}", path.read_bytes())
        caller.load(identity, previous)
    assert caller.served() == ["b"]
    assert answered(caller) == pytest.approx(logprobs(publisher.checkpoint("b")), abs=1e-5)


def test_a_bucket_that_does_not_answer_refuses_the_signal(start: Start) -> None:
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    caller = start(bucket="s3://nowhere", bucket_options=options, replica_count=1)
    answer = caller.signal("a")
    assert (answer.status_code, "bucket cannot be listed" in answer.text) == (400, True)
    assert caller.served() == [None]


def test_any_fsspec_bucket_and_names_with_an_underscore(
    start: Start, publisher: Any, tmp_path: Path
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(publisher.full("a")), f"/{tmp_path.name}/a", recursive=True)
    memory.pipe(f"/{tmp_path.name}/a/_marker.safetensors", b"not a shard")
    caller = start(bucket=f"memory://{tmp_path.name}/", replica_count=1)
    caller.load("a")
    assert caller.served() == ["a"]
    answer = caller.http.get(f"/v1/{caller.config.deployment}")
    assert answer.json()["hotLoadBucketUrl"] == f"memory://{tmp_path.name}"
