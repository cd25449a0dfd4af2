"""Wrong keys, names, bodies: the documented error, never a 500 (protocol §2-§4, §11)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[..., Any]
Caller = Any
SIGNAL = "/hot_load/v1/models/hot_load"
HINT = f"{SIGNAL}/hint"
COMPLETIONS = "/inference/v1/completions"
CHAT = "/inference/v1/chat/completions"
DEPLOYMENT = "/v1/accounts/local/deployments/rollouts"
CALLS = [
    ("POST", SIGNAL),
    ("GET", SIGNAL),
    ("POST", HINT),
    ("DELETE", f"{DEPLOYMENT}/ledger"),
    ("GET", f"{DEPLOYMENT}/ledger"),
    ("GET", DEPLOYMENT),
    ("GET", "/v1/accounts?pageSize=2"),
    ("GET", "/v1/accounts/local"),
    ("GET", "/v1/accounts/local/deployments"),
    ("GET", "/v1/accounts/local/models"),
    ("POST", COMPLETIONS),
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
]


def is_documented(answer: Any, path: str) -> bool:
    """Whether the error body has the form of protocol §3."""
    body = answer.json()
    if path.startswith("/v1/accounts"):
        return body.keys() == {"code", "message", "details"} and body["details"] == []
    return body.keys() == {"error"} and body["error"].keys() == {"message", "code", "type"}


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_missing_or_wrong_key_is_401(keyed: Caller, method: str, path: str) -> None:
    caller = keyed
    for key in ("", "Bearer", "Bearer wrong", "Basic right", "Bearer ключ"):
        headers = {"authorization": key.encode()}
        answer = caller.http.request(method, path, headers=headers, json={})
        assert answer.status_code == 401
        assert is_documented(answer, path)
        assert "right" not in answer.text
    assert caller.http.request(method, path, json={}).status_code != 401


@pytest.mark.parametrize(("method", "path"), CALLS[:3])
def test_resource_headers_are_needed_and_must_be_right(
    caller: Caller, method: str, path: str
) -> None:
    for header in ("fireworks-model", "fireworks-deployment"):
        answer = caller.http.request(method, path, headers={header: "accounts/x"}, json={})
        assert (answer.status_code, is_documented(answer, path)) == (404, True)
        answer = caller.http.request(method, path, headers={header: ""}, json={})
        assert (answer.status_code, is_documented(answer, path)) == (400, True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/accounts/other/deployments/rollouts", 404),
        ("GET", "/v1/accounts/local/deployments/other", 404),
        ("DELETE", "/v1/accounts/local/deployments/other/ledger", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("PUT", SIGNAL, 405),
        ("GET", COMPLETIONS, 405),
        ("PATCH", DEPLOYMENT, 400),
        ("DELETE", DEPLOYMENT, 400),
        ("POST", "/v1/accounts/local/deployments?deploymentId=rollouts", 409),
        ("POST", "/v1/accounts/local/deployments?deploymentId=x", 400),
    ],
)
def test_wrong_names_paths_and_methods(caller: Caller, method: str, path: str, status: int) -> None:
    answer = caller.http.request(method, path, json={} if method == "POST" else None)
    assert (answer.status_code, is_documented(answer, path)) == (status, True)


@pytest.mark.parametrize(
    "path", [SIGNAL, HINT, COMPLETIONS, CHAT, "/emulator/faults", "/emulator/tick"]
)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"{" * 5000, b'{"n": 1e999}', b"[" * 100_000],
)
def test_anything_but_a_json_object_is_400(caller: Caller, path: str, body: bytes) -> None:
    answer = caller.http.post(path, content=body)
    assert (answer.status_code, is_documented(answer, path)) == (400, True)


@pytest.mark.parametrize("path", [SIGNAL, COMPLETIONS])
def test_bodies_are_bounded(caller: Caller, path: str) -> None:
    size = 17 << 20
    assert caller.http.post(path, content=b"x" * size).status_code == 413

    def pieces() -> Any:
        for _ in range(17):
            yield b" " * (1 << 20)

    assert caller.http.post(path, content=pieces()).status_code == 413
    assert caller.served() == [None]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"identity": None}, "identity: Input should be a string"),
        ({"identity": 3}, "identity: Input should be a string"),
        ({"identity": "a/b"}, "identity"),
        ({"identity": ".."}, "identity"),
        ({"identity": "_hotload"}, "identity"),
        ({"more": 1}, "Extra inputs are not permitted, field: 'more'"),
        ({"reset_prompt_cache": "some"}, "reset_prompt_cache"),
        ({"reset_prompt_cache": 1}, "reset_prompt_cache"),
        ({"validation": []}, "validation"),
        ({"validation": {"x": 1}}, "Extra inputs are not permitted, field: 'validation.x'"),
        ({"validation": {"extra_fields_ignore": "x"}}, "validation.extra_fields_ignore"),
        ({"incremental_snapshot_metadata": None}, "incremental_snapshot_metadata"),
        ({"incremental_snapshot_metadata": {}}, "compression_format"),
    ],
)
def test_signal_fields_are_checked(caller: Caller, change: dict[str, Any], told: str) -> None:
    body = {"identity": "a"} | change
    answer = caller.http.post(SIGNAL, json={k: v for k, v in body.items() if k != "identity" or v})
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"compression_format": "arc_v3"}, "compression_format"),
        ({"checksum_format": "adler32"}, "checksum_format"),
        ({"previous_snapshot_identity": None}, "previous_snapshot_identity"),
        ({"extra": 1}, "field: 'incremental_snapshot_metadata.extra'"),
    ],
)
def test_delta_metadata_is_checked(caller: Caller, change: dict[str, Any], told: str) -> None:
    metadata = {"previous_snapshot_identity": "a", "compression_format": "arc_v2"} | change
    body = {"identity": "b", "incremental_snapshot_metadata": metadata}
    answer = caller.http.post(SIGNAL, json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"prompt": [261]},
        {"prompt": [[1], []]},
        {"prompt": {"a": 1}},
        {"prompt": [[1]] * 129},
        {"model": None},
        {"model": 3},
        {"n": 0},
        {"n": 129},
        {"n": 1.5},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"temperature": 2.1},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": -0.1},
        {"top_k": 1.5},
        {"top_k": 101},
        {"logprobs": 6},
        {"logprobs": "yes"},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 6},
        {"stream": 1},
        {"seed": "x"},
        {"stop": [""]},
        {"stop": ["a"] * 5},
        {"stop": 3},
        {"echo": "yes"},
        {"echo_last": -1},
        {"context_length_exceeded_behavior": "explode"},
        {"include_routing_matrix": True},
        {"include_routing_matrix": True, "logprobs": True},
        {"messages": []},
        {"surprise": 1},
    ],
)
def test_inference_fields_are_checked(caller: Caller, change: dict[str, Any]) -> None:
    answer = caller.complete(**change)
    assert (answer.status_code, is_documented(answer, COMPLETIONS)) == (400, True)


@pytest.mark.parametrize(
    "messages",
    [None, [], ["hi"], [{}], [{"role": 1}], [{"role": "user", "content": 3}],
     [{"role": "user", "content": [{"type": "image_url"}]}], {"role": "user"}],
)  # fmt: skip
def test_messages_are_checked(caller: Caller, messages: object) -> None:
    assert caller.chat(messages=messages).status_code == 400


def test_a_template_that_refuses_is_400(start: Start, publisher: Any) -> None:
    refusing = {"chat_template": "{{ raise_exception('no system role') }}"}
    (publisher.base / "tokenizer_config.json").write_text(json.dumps(refusing))
    answer = start(replica_count=1).chat()
    assert (answer.status_code, "no system role" in answer.text) == (400, True)
    for template in ("{{ messages[9].role.x }}", "{{ ''.__class__.__mro__ }}{{ 1/0 }}", "{% if"):
        path = publisher.base / "tokenizer_config.json"
        path.write_text(json.dumps({"chat_template": template}))
        assert start(replica_count=1).chat().status_code == 400


def test_models_are_addressed_by_header_or_by_deployment(caller: Caller) -> None:
    body = {"prompt": [1], "max_tokens": 1}

    def ask(model: str, deployment: str | None) -> int:
        headers = {"authorization": "Bearer x"}
        if deployment is not None:
            headers["fireworks-deployment"] = deployment
        request = caller.http.build_request("POST", COMPLETIONS, json={**body, "model": model})
        for header in ("fireworks-deployment", "fireworks-model"):
            del request.headers[header]
        request.headers.update(headers)
        return caller.http.send(request).status_code

    model, deployment = caller.config.model, caller.config.deployment
    assert ask(model, deployment) == 200
    assert ask(deployment, None) == 200
    assert ask(deployment, deployment) == 200
    assert ask(model, None) == 400
    assert ask(model, "accounts/local/deployments/x") == 404
    assert ask("accounts/local/models/x", deployment) == 404


def test_the_deployment_and_the_account(start: Start, publisher: Any) -> None:
    caller = start(replica_count=2, transition="SYNC", bucket_type="NEBIUS")
    found = caller.http.get(DEPLOYMENT).json()
    assert found["name"] == "accounts/local/deployments/rollouts"
    assert found["baseModel"] == "accounts/fireworks/models/base-model"
    assert found["hotLoadBucketUrl"] == str(publisher.bucket)
    assert (found["hotLoadTransitionType"], found["hotLoadBucketType"]) == ("SYNC", "NEBIUS")
    assert (found["state"], found["enableHotLoad"]) == ("READY", True)
    assert (found["desiredReplicaCount"], found["minReplicaCount"]) == (2, 2)
    accounts = caller.http.get("/v1/accounts?pageSize=2").json()["accounts"]
    assert [account["name"] for account in accounts] == ["accounts/local"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/emulator/tick", {"seconds": -1}),
        ("/emulator/tick", {"seconds": "1"}),
        ("/emulator/replicas", {"action": "restart"}),
        ("/emulator/replicas", {"action": "explode", "replica": 0}),
        ("/emulator/replicas", {"action": "remove", "replica": [1]}),
    ],
)
def test_the_emulators_own_endpoints_check_too(
    caller: Caller, path: str, body: dict[str, Any]
) -> None:
    assert caller.http.post(path, json=body).status_code in (400, 404)
    assert caller.http.delete("/emulator/faults?number=x").status_code == 400
