"""Samples of other servers than the vendor's, served over HTTP as those servers write them."""

import base64
import copy
import io
import json
from typing import Any

import numpy as np
import pytest

from blocks.account import InferenceAccount
from blocks.rollout_client import RolloutClient
from hotload.clients.inference.client import InferenceClient
from hotload.errors import ServiceError, ServiceRefusedError, ServiceUnavailableError
from hotload.options import Sampling
from hotload.rollout.engines.known import KINDS
from hotload.rollout.trajectory import Problem, Trajectory, Weights
from tests.blocks.scripted_inference import DONE, Naps, event
from tests.engines import answers
from tests.engines.answers import IDENTITY, IDS, LOGPROBS, PROMPT, RECORDED, Recorded
from tests.scripted_server import JSON, Reply, Request, ScriptedServer, http

PROBLEMS = {
    "ids": Problem("p", prompt=PROMPT),
    "text": Problem("p", prompt="one two"),
    "chat": Problem("p", messages=({"role": "user", "content": "one two"},)),
}
OTHER = "run-000002-0badf00d"


def client(port: int, engine: str, **fields: Any) -> InferenceClient:
    account = InferenceAccount(
        account_id="a",
        model_id="org/m",
        deployment_id="d",
        base_url=f"http://127.0.0.1:{port}",
        dialect="plain",
    )
    return RolloutClient(account=account, engine=engine, **fields).open()


def stream(*chunks: dict[str, Any], done: bytes = DONE) -> bytes:
    return http(b"".join(map(event, chunks)) + done)


def whole(answer: dict[str, Any], status: int = 200) -> bytes:
    return http(json.dumps(answer).encode(), status, JSON)


def reply(recorded: Recorded) -> bytes:
    return stream(*recorded.chunks) if recorded.is_stream else whole(recorded.chunks[0])


async def sampled(
    engine: str, form: str, *replies: Reply, **settings: Any
) -> tuple[Trajectory, list[Request], list[float]]:
    """One sample, what was asked for it, and the waits between."""
    naps = Naps()
    fields = {name: settings.pop(name) for name in RolloutClient.model_fields if name in settings}
    async with (
        ScriptedServer(*replies).running() as script,
        client(script.port, engine, **fields).session(
            Sampling(max_completion_tokens=8, **settings),
            identity=IDENTITY,
            policy_version=3,
            swap_timeout_seconds=600,
            sleep=naps,
        ) as sampler,
    ):
        trajectory = await sampler.sample(PROBLEMS[form], 0)
        return trajectory, script.requests, naps.seconds


def named(recorded: Recorded) -> str:
    return f"{recorded.engine} {recorded.form}"


@pytest.mark.parametrize("recorded", RECORDED, ids=named)
async def test_an_answer_is_read_to_its_tokens_and_what_made_them(recorded: Recorded) -> None:
    trajectory, [request], _ = await sampled(recorded.engine, recorded.form, reply(recorded))
    assert (trajectory.failure, trajectory.detail) == (None, "")
    [segment] = trajectory.segments
    assert (segment.prompt_token_ids, segment.token_ids_T) == (PROMPT, IDS)
    assert segment.sampling_logprobs_T == pytest.approx(LOGPROBS)
    assert (trajectory.text, trajectory.finish_reason) == ("ab", "stop")
    assert (trajectory.prompt_token_count, trajectory.completion_token_count) == (2, 2)
    weights = Weights.EXPECTED if recorded.names_weights else Weights.ASSUMED
    assert trajectory.weights is weights
    assert trajectory.provenance.runs == (((0, IDENTITY),) if recorded.names_weights else ())
    assert request.path == recorded.path


# What each server is sent, word for word but for seed and prompt.
OPENAI = {"model": "org/m", "n": 1, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PENALTIES = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
VLLM = {
    **OPENAI,
    **STREAM,
    "top_k": 0,
    **PENALTIES,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_weight_versions": True,
}
SENT: dict[tuple[str, str], dict[str, Any]] = {
    ("vllm", "ids"): {**VLLM, "logprobs": 0, "prompt": [1, 2]},
    ("vllm", "chat"): {**VLLM, "logprobs": True},
    ("vllm-generate", "ids"): {
        "model": "org/m",
        "token_ids": [1, 2],
        "output_mode": "text",
        **STREAM,
        "sampling_params": {
            "n": 1,
            "max_tokens": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            **PENALTIES,
            "logprobs": 0,
        },
    },
    ("sglang", "ids"): {
        "input_ids": [1, 2],
        "sampling_params": {
            "n": 1,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            **PENALTIES,
        },
        "return_logprob": True,
        "return_prompt_token_ids": True,
        "stream": False,
    },
    ("sglang", "chat"): {
        **OPENAI,
        "top_k": -1,
        **PENALTIES,
        "logprobs": True,
        "return_token_ids": True,
        "stream": False,
    },
    ("llama.cpp", "ids"): {
        **OPENAI,
        "stream": False,
        "prompt": [1, 2],
        "logprobs": 1,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dynatemp_range": 0.0,
        "adaptive_target": -1.0,
        "mirostat": 0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "post_sampling_probs": True,
    },
    ("tgi", "text"): {
        "inputs": "one two",
        "parameters": {
            "max_new_tokens": 8,
            "do_sample": True,
            "temperature": 1.0,
            "details": True,
            "decoder_input_details": True,
            "return_full_text": False,
        },
    },
    ("openai", "ids"): {**OPENAI, **STREAM, "prompt": [1, 2], "logprobs": 1},
}


@pytest.mark.parametrize(("engine", "form"), SENT)
async def test_a_request_has_neutral_values_and_no_field_that_is_refused(
    engine: str, form: str
) -> None:
    [recorded] = [one for one in RECORDED if (one.engine, one.form) == (engine, form)]
    _, [request], _ = await sampled(engine, form, reply(recorded))
    body = request.body
    places = [body, body.get("sampling_params", {}), body.get("parameters", {})]
    assert sum("seed" in place or "sampling_seed" in place for place in places) == 1
    for place in places:
        place.pop("seed", place.pop("sampling_seed", None))
    body.pop("messages", None)
    assert body == SENT[engine, form]


async def test_filters_and_stops_are_spelt_as_each_takes_them() -> None:
    for recorded in RECORDED:
        settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop": ("x",)}
        _, [request], _ = await sampled(recorded.engine, recorded.form, reply(recorded), **settings)
        body = request.body
        place = body.get("sampling_params") or body.get("parameters") or body
        told = {name: place[name] for name in ("temperature", "top_p", "stop")}
        assert told == {"temperature": 0.5, "top_p": 0.9, "stop": ["x"]}, recorded
        assert place.get("top_k") == (None if recorded.engine == "openai" else 5)


async def test_log_probabilities_of_another_distribution_are_none() -> None:
    """Each by what its engine's are of."""
    filtered, tempered = {"top_p": 0.9}, {"temperature": 0.5}
    taken = {
        ("vllm", "ids"): (filtered, tempered),
        ("sglang", "ids"): (tempered,),
        ("llama.cpp", "ids"): (filtered, tempered),
        ("tgi", "text"): (filtered, tempered),
        ("openai", "ids"): (),
    }
    for (engine, form), settings in taken.items():
        [recorded] = [one for one in RECORDED if (one.engine, one.form) == (engine, form)]
        for tried in (filtered, tempered, {"temperature": 0.0}):
            trajectory, *_ = await sampled(engine, form, reply(recorded), **tried)
            expected = None if tried in settings else "missing_logprobs"
            assert trajectory.failure == expected, (engine, tried)


async def test_a_request_that_straddles_tells_which_weights_made_which_tokens() -> None:
    spans = [
        {"version": OTHER, "start": 0, "end": 1},
        {"version": IDENTITY, "start": 1, "end": 2},
    ]
    first, last = answers.VLLM_STREAM[0], answers.vllm_token(1, finish_reason="stop")
    last["choices"][0]["weight_versions"] = spans
    meta = answers.sglang_meta(weight_versions=spans)
    chat = answers.sglang_chat()
    chat["metadata"]["weight_versions"] = spans
    for engine, form, said in (
        ("vllm", "ids", stream(first, last)),
        ("sglang", "ids", whole(answers.sglang(meta))),
        ("sglang", "chat", whole(chat)),
    ):
        trajectory, *_ = await sampled(engine, form, said)
        assert trajectory.failure is None
        assert trajectory.weights is Weights.STRADDLING
        assert trajectory.provenance.runs == ((0, OTHER), (1, IDENTITY))
        dropped, *_ = await sampled(engine, form, said, groups={"on_straddling": "drop"})
        assert dropped.failure == "straddling"


async def test_weights_that_nobody_labelled_have_no_name() -> None:
    said = whole(answers.sglang(answers.sglang_meta(weight_version="default")))
    trajectory, *_ = await sampled("sglang", "ids", said)
    assert trajectory.failure is None
    assert trajectory.weights is Weights.ASSUMED


def changed(recorded: Recorded, **choice: Any) -> bytes:
    """The answer with other values in every choice of it."""
    other = copy.deepcopy(recorded)
    for chunk in other.chunks:
        for each in chunk.get("choices", ()):
            each.update({name: value for name, value in choice.items() if name in each})
    return reply(other)


def of(engine: str, form: str) -> Recorded:
    return next(one for one in RECORDED if (one.engine, one.form) == (engine, form))


NO_LABELS = answers.sglang_meta(output_token_logprobs=None)
SHORT = answers.sglang_meta(output_token_logprobs=[[-0.5, 5, None]])
LABELS = [{"version": IDENTITY, "start": 0, "end": 1}]
GAP = [{"version": IDENTITY, "start": 1, "end": 2}]
LACKING: list[tuple[str, str, bytes, str]] = [
    # No token ids, of the tokens or of the prompt.
    ("vllm", "chat", stream(*answers.CHAT_STREAM[1:]), "missing_token_ids"),
    ("vllm", "text", stream(*answers.VLLM_STREAM[1:]), "malformed"),  # and a token less
    ("sglang", "chat", changed(of("sglang", "chat"), response_token_ids=None), "missing_token_ids"),
    ("sglang", "text", whole(answers.sglang(prompt_token_ids=None)), "missing_token_ids"),
    ("tgi", "text", whole(answers.tgi(prefill=[])), "missing_token_ids"),
    ("openai", "text", whole(answers.openai()), "missing_token_ids"),
    # No log-probabilities.
    ("vllm", "ids", changed(of("vllm", "ids"), logprobs=None), "missing_logprobs"),
    ("vllm", "chat", changed(of("vllm", "chat"), logprobs=None), "missing_logprobs"),
    (
        "vllm-generate",
        "ids",
        changed(of("vllm-generate", "ids"), logprobs=None),
        "missing_logprobs",
    ),
    ("sglang", "ids", whole(answers.sglang(NO_LABELS)), "missing_logprobs"),
    ("openai", "ids", whole(answers.openai(logprobs=None)), "missing_logprobs"),
    # vLLM's word for one it does not have.
    (
        "vllm",
        "chat",
        changed(
            of("vllm", "chat"),
            logprobs={"content": [{"token": "token_id:5", "logprob": -9999.0}]},
        ),
        "missing_logprobs",
    ),
    # Of other lengths.
    ("vllm", "ids", changed(of("vllm", "ids"), token_ids=[5, 6]), "missing_token_ids"),
    ("sglang", "ids", whole(answers.sglang(SHORT)), "missing_token_ids"),
    ("sglang", "ids", whole(answers.sglang(output_ids=[5, 6, 7])), "missing_token_ids"),
    ("sglang", "ids", whole(answers.sglang(prompt_token_ids=[1, 2, 3])), "malformed"),
    ("tgi", "text", whole(answers.tgi(generated_tokens=3)), "malformed"),
    # llama.cpp leaves tokens out that are no whole letters.
    ("llama.cpp", "ids", whole(answers.llama_cpp(1)), "malformed"),
    # Labels of weights that leave tokens out.
    ("vllm", "ids", changed(of("vllm", "ids"), weight_versions=LABELS[:1]), "malformed"),
    (
        "sglang",
        "ids",
        whole(answers.sglang(answers.sglang_meta(weight_versions=LABELS))),
        "malformed",
    ),
    ("sglang", "ids", whole(answers.sglang(answers.sglang_meta(weight_versions=GAP))), "malformed"),
    # Another token than the id beside its log-probability.
    ("vllm", "ids", changed(of("vllm", "ids"), token_ids=[9]), "missing_token_ids"),
]


@pytest.mark.parametrize(("engine", "form", "said", "failure"), LACKING)
async def test_what_cannot_be_trained_on_is_a_failed_sample(
    engine: str, form: str, said: bytes, failure: str
) -> None:
    trajectory, *_ = await sampled(engine, form, said)
    assert trajectory.failure == failure, trajectory.detail


def error(status: int, message: str, kind: str = "X") -> bytes:
    return whole({"error": {"message": message, "type": kind, "code": status}}, status)


ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
BUSY = {**ABORTED, "message": "The request queue is full.", "status_code": 503}
VLLM_PAUSED = {
    "error": {
        "message": "Generation is paused. Please retry after it resumes.",
        "type": "ServiceUnavailableError",
        "code": 503,
    }
}
SWAPS = [
    ("vllm", "ids", stream(answers.vllm_token(0, finish_reason="abort", token_ids=[]))),
    ("vllm-generate", "ids", stream(generated := answers.generated(0, finish_reason="abort"))),
    ("vllm", "chat", stream(VLLM_PAUSED)),
    ("vllm-generate", "ids", whole(VLLM_PAUSED, 503)),
    ("sglang", "ids", whole(answers.sglang(answers.sglang_meta(finish_reason=ABORTED)))),
    ("sglang", "chat", whole(answers.sglang_chat(finish_reason="abort"))),
    ("llama.cpp", "ids", error(503, "Loading model", "unavailable_error")),
]
PASSING = [
    ("vllm", "ids", error(503, "The engine is currently busy and cannot accept new requests.")),
    (
        "vllm",
        "ids",
        stream({"error": {"message": "x", "type": "InternalServerError", "code": 500}}),
    ),
    ("sglang", "ids", whole(answers.sglang(answers.sglang_meta(finish_reason=BUSY)))),
    ("llama.cpp", "ids", error(503, "no slot")),
    ("tgi", "text", whole({"error": "Model is overloaded", "error_type": "overloaded"}, 429)),
    ("tgi", "text", whole({"error": "Request failed", "error_type": "generation"}, 424)),
    ("openai", "ids", error(503, "hot loading")),
]


@pytest.mark.parametrize(("engine", "form", "said"), SWAPS)
async def test_a_pause_of_the_engine_is_waited_out_as_a_swap(
    engine: str, form: str, said: bytes
) -> None:
    replies = [said] * 9 + [reply(of(engine, form))]  # more than the attempts at what may pass
    trajectory, requests, waits = await sampled(engine, form, *replies)
    assert trajectory.failure is None, trajectory.detail
    assert len(requests) == 10
    assert max(waits) <= 7.5


@pytest.mark.parametrize(("engine", "form", "said"), PASSING[:-1])
async def test_what_may_pass_is_tried_seven_times(engine: str, form: str, said: bytes) -> None:
    trajectory, requests, _ = await sampled(engine, form, said)
    assert trajectory.failure in ("overloaded", "server_error")
    assert len(requests) == 7


@pytest.mark.parametrize("engine", [name for name in KINDS if name not in ("fireworks", "mlx")])
async def test_404_is_a_wrong_address_or_name_and_no_swap(engine: str) -> None:
    form = next(one.form for one in RECORDED if one.engine == engine)
    with pytest.raises(ServiceRefusedError, match=r"404.* For the account block: "):
        await sampled(engine, form, error(404, "The model `org/m` does not exist."))


async def test_a_route_that_is_switched_off_says_what_switches_it_on() -> None:
    off = error(403, "Scale-out endpoints are disabled.", "PermissionDeniedError")
    with pytest.raises(ServiceRefusedError, match="--enable-scale-out"):
        await sampled("vllm-generate", "ids", off)


@pytest.mark.parametrize("form", ["text", "chat"])
async def test_what_an_engine_cannot_tell_the_ids_of_is_not_asked(form: str) -> None:
    for engine in ("llama.cpp", "mlx"):
        with pytest.raises(ServiceRefusedError, match="cannot be trained on there"):
            await sampled(engine, form, b"")


async def asked_first(
    engine: str, *replies: Reply, **settings: Any
) -> tuple[ServiceError | None, list[Request]]:
    async with ScriptedServer(*replies).running() as script:
        try:
            await client(script.port, engine).ask_first(Sampling(**settings))
        except ServiceError as error:
            return error, script.requests
        return None, script.requests


FIRST = {one.engine: one for one in reversed(RECORDED)}


@pytest.mark.parametrize("engine", FIRST)
async def test_the_preflight_takes_what_can_be_trained_on(engine: str) -> None:
    trouble, [request] = await asked_first(engine, reply(FIRST[engine]))
    assert trouble is None
    assert request.path == FIRST[engine].path


REFUSED: list[tuple[str, dict[str, Any], list[bytes], str]] = [
    ("mlx", {}, [], "sample from another server"),
    ("openai", {}, [whole(answers.openai(logprobs=None))], "say so as the block's engine"),
    ("openai", {}, [error(422, "Unexpected fields: seed")], "HTTP 422"),
    ("openai", {"temperature": 0.5}, [], "are the model's own: temperature 1"),
    ("vllm", {}, [changed(of("vllm", "ids"), token_ids=None, logprobs=None)], "--logprobs-mode"),
    ("vllm", {}, [error(404, "no such model")], "--served-model-name"),
    ("vllm", {"temperature": 0.0}, [], "temperature above 0"),
    ("vllm-generate", {}, [error(403, "Scale-out endpoints are disabled.")], "--enable-scale-out"),
    ("sglang", {"top_k": 5}, [], "without filters"),
    ("sglang", {"include_routing_matrix": True}, [], "routes of experts"),
    ("llama.cpp", {}, [error(501, "This server does not support completions.")], "HTTP 501"),
    ("tgi", {}, [whole(answers.tgi(prefill=[]))], "--enable-prefill-logprobs"),
    ("tgi", {}, [whole({"generated_text": "ab"})], "--enable-prefill-logprobs"),
    ("vllm", {}, [http(b"<html>", content_type="text/html")], "expected text/event-stream"),
]


@pytest.mark.parametrize(("engine", "settings", "said", "advice"), REFUSED)
async def test_the_preflight_refuses_what_cannot_and_says_what_to_switch_on(
    engine: str, settings: dict[str, Any], said: list[bytes], advice: str
) -> None:
    trouble, requests = await asked_first(engine, *(said or [b""]), **settings)
    assert advice in str(trouble)
    assert len(requests) == len(said)
    if "HTTP 501" not in advice:
        assert isinstance(trouble, ServiceRefusedError)


async def test_the_preflight_only_doubts_what_may_pass() -> None:
    for said in (error(503, "busy"), stream(VLLM_PAUSED), stream(answers.VLLM_STREAM[0], done=b"")):
        trouble, _ = await asked_first("vllm", said)
        assert isinstance(trouble, ServiceUnavailableError)


@pytest.mark.parametrize(
    ("engine", "settings", "question"),
    [
        ("vllm", {"top_p": 0.9}, {"temperature": 1.0, "top_p": 1.0, "top_k": 1}),
        ("vllm-generate", {"temperature": 0.5}, {"temperature": 1.0, "top_p": 1.0, "top_k": 1}),
        ("sglang", {"temperature": 0.5}, {"temperature": 0.001, "top_p": 1.0, "top_k": -1}),
    ],
)
async def test_the_preflight_asks_for_a_certain_token(
    engine: str, settings: dict[str, Any], question: dict[str, Any]
) -> None:
    """Its log-probability is 0 where it is of the distribution that was sampled, and only there."""
    good = reply(FIRST[engine])
    certain = good.replace(b"-0.5", b"-0.0").replace(b"-1.25", b"-0.01")
    trouble, requests = await asked_first(engine, good, certain, **settings)
    assert trouble is None
    asked = requests[1].body
    place = asked.get("sampling_params", asked)
    assert {name: place[name] for name in question} == question
    trouble, _ = await asked_first(engine, good, good, **settings)
    assert isinstance(trouble, ServiceRefusedError)
    assert "-1.25 for a token that was certain" in str(trouble)


async def test_check_and_warm_up_ask_as_samples_are_asked() -> None:
    good, bad = reply(FIRST["vllm"]), error(503, "busy")
    async with ScriptedServer(bad, good).running() as script:
        assert await client(script.port, "vllm").warm_up(retries=3, sleep=Naps())
        [line] = await client(script.port, "vllm").check()
        assert line.ok
    async with ScriptedServer(whole(answers.openai(logprobs=None))).running() as script:
        [line] = await client(script.port, "openai").check()
        assert not line.ok
        assert "block's engine" in line.advice


async def test_prefix_and_header_names_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", "sk-of-the-vendor")
    good = reply(of("vllm", "ids"))
    _, [usual], _ = await sampled("vllm", "ids", good)
    assert usual.headers["x-session-id"].startswith("s-")
    assert usual.headers["x-request-id"].startswith("r-")
    assert "x-session-affinity" not in usual.headers
    assert "authorization" not in usual.headers  # the vendor's key is nobody else's
    _, [other], _ = await sampled(
        "vllm",
        "ids",
        good,
        path_prefix="/door/7",
        session_headers=("x-route", "x-affinity"),
        request_id_header="x-trace",
    )
    assert other.path == "/door/7/v1/completions"
    assert other.headers["x-route"] == other.headers["x-affinity"] == usual.headers["x-session-id"]
    assert other.headers["x-trace"] == usual.headers["x-request-id"]
    assert "x-request-id" not in other.headers


def test_a_block_says_what_it_lacks() -> None:
    names = {"account_id": "a", "deployment_id": "d"}
    with pytest.raises(ValueError, match="engine vllm needs the account's base_url"):
        RolloutClient(account=InferenceAccount(model_id="m", **names), engine="vllm")
    with pytest.raises(ValueError, match="more than a name"):
        InferenceAccount(model_id="org/m", **names)
    with pytest.raises(ValueError, match="path_prefix"):
        client(1, "vllm", path_prefix="door")
    with pytest.raises(ValueError, match="session_headers"):
        client(1, "vllm", session_headers=("x: y",))


async def test_the_probe_is_the_vendors_alone() -> None:
    with pytest.raises(ServiceRefusedError, match="probe_sessions to 0"):
        await client(1, "vllm").ask_logprobs((1, 2), "s")


async def test_routes_of_experts_come_in_whole_answers_of_vllm() -> None:
    file = io.BytesIO()
    experts = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)  # of prompt and answer but one
    np.save(file, experts)
    [choice] = copy.deepcopy(answers.VLLM_STREAM[0]["choices"])
    both = {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [*LOGPROBS]}
    choice |= {"text": "ab", "logprobs": both, "token_ids": [*IDS], "finish_reason": "length"}
    choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
    said = whole({**answers.VLLM_LAST, "choices": [choice]})
    trajectory, [request], _ = await sampled("vllm", "ids", said, include_routing_matrix=True)
    assert trajectory.failure is None
    [segment] = trajectory.segments
    assert segment.routes == experts.astype("<i2").tobytes()
    assert request.body["stream"] is False
    assert "stream_options" not in request.body
