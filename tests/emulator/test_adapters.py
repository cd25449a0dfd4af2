"""LoRA adapters side by side: which one answers, which one makes room, and how one is unloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.emulator.test_loading import PROMPT, logprobs

Start = Callable[..., Any]
DEPLOYED = "/v1/accounts/local/deployedModels"
DEPLOYMENT = "accounts/local/deployments/rollouts"


def asked(caller: Any, model: str | None = None, session: str = "s") -> tuple[str, list[float]]:
    """The model that answers, and its log-probabilities of the prompt."""
    answer = caller.complete(
        prompt=PROMPT,
        echo=True,
        logprobs=True,
        max_tokens=0,
        headers={"x-session-affinity": session},
        **({} if model is None else {"model": model}),
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    content = body["choices"][0]["logprobs"]["content"]
    return body["model"].rpartition("@")[2], [entry["logprob"] for entry in content][1:]


def named(adapter: str) -> str:
    return f"accounts/local/models/{adapter}#{DEPLOYMENT}"


def loaded(caller: Any) -> list[list[str]]:
    """The adapters of each replica."""
    return [
        [one["identity"] for one in each.get("loaded_adapters", []) if one["status"] == "loaded"]
        for each in caller.replicas()
    ]


@pytest.fixture
def adapters(start: Start, publisher: Any) -> tuple[Any, dict[str, list[float]]]:
    """A fleet with two slots that has loaded three adapters, and what each one answers."""
    caller = start(adapter_slots=2)
    publisher.full("a")
    caller.load("a")
    expected = {"a": logprobs(publisher.checkpoint("a"))}
    for seed, name in enumerate(("l-1", "l-2", "l-3")):
        expected[name] = logprobs(publisher.checkpoint("a"), publisher.lora(name, seed=seed))
        caller.load(name)
    assert len({tuple(values) for values in expected.values()}) == 4
    return caller, expected


def test_each_adapter_answers_by_its_name_and_the_newest_without(
    adapters: tuple[Any, dict[str, list[float]]],
) -> None:
    caller, expected = adapters
    assert loaded(caller) == [["l-2", "l-3"]] * 2  # the oldest made room
    for model, name in ((None, "l-3"), (named("l-2"), "l-2"), (named("l-3"), "l-3"), (None, "l-3")):
        served, values = asked(caller, model)
        assert (served, values) == (name, pytest.approx(expected[name], abs=1e-5))
    served, _ = asked(caller, f"{caller.config.model}#{DEPLOYMENT}")
    assert served == "l-3"
    body = {"prompt": [1], "max_tokens": 1}
    for model in (named("l-1"), f"accounts/local/models/l-2#{DEPLOYMENT}x", "x#"):
        assert caller.complete(**body, model=model).status_code == 404
    listed = caller.http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed][2:] == [named("l-2"), named("l-3")]


def test_an_adapter_is_unloaded_and_loaded_again(
    adapters: tuple[Any, dict[str, list[float]]],
) -> None:
    caller, expected = adapters
    shown = caller.http.get(DEPLOYED).json()["deployedModels"]
    assert [(one["name"].rpartition("/")[2], one["state"], one["default"]) for one in shown] == [
        ("l-2", "DEPLOYED", False),
        ("l-3", "DEPLOYED", True),
    ]
    assert caller.http.get(f"{DEPLOYED}/l-3").json() == shown[1]
    assert caller.http.delete(f"{DEPLOYED}/l-3").status_code == 200
    assert caller.http.delete(f"{DEPLOYED}/l-3").status_code == 404
    assert caller.http.get(f"{DEPLOYED}/l-3").status_code == 404
    assert loaded(caller) == [["l-2"]] * 2
    assert asked(caller) == ("l-2", pytest.approx(expected["l-2"], abs=1e-5))
    assert caller.complete(model=named("l-3")).status_code == 404

    # A restart brings back what was loaded, and not what was unloaded.
    caller.http.post("/emulator/replicas", json={"action": "restart", "replica": 0})
    caller.tick()
    assert loaded(caller) == [["l-2"]] * 2
    assert caller.http.delete(f"{DEPLOYED}/l-2").status_code == 200
    assert loaded(caller) == [[]] * 2
    assert asked(caller) == ("a", pytest.approx(expected["a"], abs=1e-5))

    body = {"model": "accounts/local/models/l-3", "deployment": DEPLOYMENT}
    assert caller.http.post(DEPLOYED, json=body).status_code == 200
    caller.tick()
    assert loaded(caller) == [["l-3"]] * 2
    assert asked(caller) == ("l-3", pytest.approx(expected["l-3"], abs=1e-5))
    assert caller.http.post(DEPLOYED, json=body).status_code == 409
    for wrong in ({"model": "accounts/local/models/a"}, {"deployment": "x"}, {"model": "l-2"}):
        assert caller.http.post(DEPLOYED, json=body | wrong).status_code == 404
    assert caller.http.get("/v1/accounts/other/deployedModels").status_code == 404


def test_keys_and_values_of_one_adapter_are_not_anothers(
    adapters: tuple[Any, dict[str, list[float]]],
) -> None:
    caller, _ = adapters

    def cached(model: str) -> int:
        headers = {"x-session-affinity": "s"}
        answer = caller.complete(prompt=PROMPT * 4, model=model, max_tokens=1, headers=headers)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    newest = caller.config.deployment
    assert (cached(newest), cached(newest)) == (0, 4 * len(PROMPT) - 1)
    assert (cached(named("l-2")), cached(named("l-2"))) == (0, 4 * len(PROMPT) - 1)
    caller.http.delete(f"{DEPLOYED}/l-3")
    assert (cached(newest), cached(newest)) == (0, 4 * len(PROMPT) - 1)


def test_other_weights_below_free_every_slot(
    adapters: tuple[Any, dict[str, list[float]]], publisher: Any
) -> None:
    caller, _ = adapters
    publisher.delta("b", "a")
    caller.load("b", "a")
    assert loaded(caller) == [[]] * 2
    assert asked(caller) == ("b", pytest.approx(logprobs(publisher.checkpoint("b")), abs=1e-5))
    expected = logprobs(publisher.checkpoint("b"), publisher.lora("l-4", seed=9))
    caller.load("l-4")
    assert asked(caller) == ("l-4", pytest.approx(expected, abs=1e-5))
