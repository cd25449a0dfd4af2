"""What we send and read, held to the request and response classes of vLLM and SGLang themselves."""

from typing import Any

import pytest
from pydantic import TypeAdapter
from sglang.api.v1 import api_types
from sglang.srt.entrypoints.openai import protocol as sglang_openai
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.sampling.sampling_params import SamplingParams as SglangSampling
from sglang.srt.utils import weight_versions
from vllm.entrypoints.openai.chat_completion import protocol as vllm_chat
from vllm.entrypoints.openai.completion import protocol as vllm_completion
from vllm.entrypoints.scale_out.token_in_token_out import protocol as vllm_generate
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import QueueOverflowError, RetryableRequestError
from vllm.outputs import WeightVersionSpan

from hotload.options import Sampling
from hotload.rollout.completions_api import Answer
from hotload.rollout.engines.kind import PromptForm, form_of
from hotload.rollout.engines.known import KINDS
from hotload.rollout.failures import Action, failure_in_stream, failure_of_status
from hotload.rollout.request import first_request
from hotload.rollout.trajectory import Problem
from tests.engines import answers
from tests.engines.answers import IDENTITY, IDS, LOGPROBS, PROMPT, RECORDED, Recorded

PROBLEMS = {
    "ids": Problem("p", prompt=PROMPT),
    "text": Problem("p", prompt="one two"),
    "chat": Problem(
        "p",
        messages=({"role": "user", "content": "one two"},),
        extra={"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ),
}
WHOLE = {"max_completion_tokens": 8, "stop": ("x",)}
FILTERED = {**WHOLE, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
VOCABULARY = 100


def body_of(engine: str, form: str, **settings: Any) -> dict[str, Any]:
    problem = PROBLEMS[form]
    request = first_request(
        problem, 0, sampling=Sampling(**settings), identity=IDENTITY, policy_version=3
    )
    return KINDS[engine].endpoints[form_of(problem)].body(request, "m")


def extra_of(model: Any) -> set[str]:
    """Fields that the class does not know."""
    return set(model.model_extra or {})


# vLLM


@pytest.mark.parametrize("settings", [WHOLE, FILTERED])
@pytest.mark.parametrize("form", ["ids", "text", "chat"])
def test_vllm_takes_every_field_and_samples_as_declared(
    form: str, settings: dict[str, Any]
) -> None:
    body = body_of("vllm", form, **settings)
    if form == "chat":
        chat = vllm_chat.ChatCompletionRequest(**body)
        assert not extra_of(chat)
        parameters = chat.to_sampling_params(8, {"top_k": 40, "min_p": 0.3})
    else:
        completion = vllm_completion.CompletionRequest(**body)
        assert not extra_of(completion)
        parameters = completion.to_sampling_params(8, {"top_k": 40, "min_p": 0.3})
    check_vllm(parameters, settings)


@pytest.mark.parametrize("settings", [WHOLE, FILTERED])
def test_vllm_generate_takes_every_field(settings: dict[str, Any]) -> None:
    body = body_of("vllm-generate", "ids", **settings)
    known = vllm_generate.GenerateRequest.model_fields
    assert not body.keys() - known.keys()
    request = vllm_generate.GenerateRequest.model_validate(body)
    assert request.token_ids == [*PROMPT]
    assert request.output_mode == "text"
    check_vllm(request.sampling_params, settings)


def check_vllm(parameters: Any, settings: dict[str, Any]) -> None:
    assert parameters.temperature == settings.get("temperature", 1)
    assert parameters.top_p == settings.get("top_p", 1)
    assert parameters.top_k == settings.get("top_k", 0)
    assert parameters.min_p == parameters.presence_penalty == parameters.frequency_penalty == 0
    assert parameters.repetition_penalty == 1
    assert parameters.logprobs == 0
    assert parameters.stop == ["x"]
    assert parameters.seed is not None
    assert parameters.max_tokens == 8


@pytest.mark.parametrize(
    ("chunks", "kind"),
    [
        (answers.VLLM_STREAM, vllm_completion.CompletionStreamResponse),
        (answers.CHAT_STREAM, vllm_chat.ChatCompletionStreamResponse),
        (answers.GENERATE_STREAM, vllm_generate.GenerateTextStreamResponse),
    ],
)
def test_the_recorded_streams_are_vllms(chunks: list[dict[str, Any]], kind: Any) -> None:
    for chunk in chunks:
        model = kind.model_validate(chunk)
        assert not extra_of(model)
        assert not chunk.keys() - kind.model_fields.keys()
        for choice, given in zip(model.choices, chunk["choices"], strict=True):
            assert not given.keys() - type(choice).model_fields.keys()
            for span in choice.weight_versions or ():
                assert isinstance(span, WeightVersionSpan)


def test_whole_answers_of_vllm_are_read_as_their_classes_write_them() -> None:
    entry = vllm_generate.GenerateLogProbsContent
    choice = vllm_generate.GenerateTokensChoice(
        index=0,
        finish_reason="stop",
        token_ids=[*IDS],
        logprobs=vllm_generate.GenerateLogProbs(
            content=[
                entry(token_id=token_id, logprob=logprob, rank=1)
                for token_id, logprob in zip(IDS, LOGPROBS, strict=True)
            ]
        ),
        weight_versions=[WeightVersionSpan(IDENTITY, 0, 2)],
    )
    generated = vllm_generate.GenerateTokensResponse(choices=[choice], prompt_token_ids=[*PROMPT])
    check_read("vllm-generate", "ids", generated.model_dump(mode="json"))
    logprobs = vllm_completion.CompletionLogProbs(
        tokens=[f"token_id:{token_id}" for token_id in IDS], token_logprobs=[*LOGPROBS]
    )
    completed = vllm_completion.CompletionResponseChoice(
        index=0,
        text="ab",
        logprobs=logprobs,
        finish_reason="stop",
        token_ids=[*IDS],
        prompt_token_ids=[*PROMPT],
        weight_versions=[WeightVersionSpan(IDENTITY, 0, 2)],
    )
    whole = vllm_completion.CompletionResponse(
        model="m", choices=[completed], usage=dict(answers.USAGE)
    )
    check_read("vllm", "text", whole.model_dump(mode="json"))


def test_vllms_failures_are_told_apart() -> None:
    rules = KINDS["vllm"].endpoints[PromptForm.IDS].reading.rules
    paused = create_error_response(
        RetryableRequestError("Generation is paused. Please retry after it resumes.")
    ).model_dump()
    assert paused["error"]["code"] == 503
    assert failure_in_stream(paused, rules).action is Action.WAIT_FOR_SWAP
    busy = create_error_response(QueueOverflowError()).model_dump()
    assert failure_in_stream(busy, rules).action is Action.RETRY
    text = str(busy)
    assert failure_of_status(503, text, "", rules=rules).action is Action.RETRY


# SGLang


@pytest.mark.parametrize("settings", [WHOLE, FILTERED])
@pytest.mark.parametrize("form", ["ids", "text"])
def test_sglang_takes_every_field_and_samples_as_declared(
    form: str, settings: dict[str, Any]
) -> None:
    body = body_of("sglang", form, **settings)
    request = api_types.GenerateRequest.from_json_value(body)
    assert not body.keys() - set(request.__struct_fields__)
    check_sglang(SglangSampling(**body["sampling_params"]), settings)


@pytest.mark.parametrize("settings", [WHOLE, FILTERED])
def test_sglangs_chats_take_every_field(settings: dict[str, Any]) -> None:
    body = body_of("sglang", "chat", **settings)
    assert not body.keys() - sglang_openai.ChatCompletionRequest.model_fields.keys()
    chat = sglang_openai.ChatCompletionRequest(**body)
    told = chat.to_sampling_params(["x"], {"top_k": 40, "min_p": 0.3}, None)
    check_sglang(SglangSampling(**told), settings)


def check_sglang(parameters: SglangSampling, settings: dict[str, Any]) -> None:
    parameters.verify(VOCABULARY)
    assert parameters.temperature == settings.get("temperature", 1)
    assert parameters.top_p == settings.get("top_p", 1)
    assert parameters.top_k == settings.get("top_k", TOP_K_ALL)
    assert parameters.min_p == parameters.presence_penalty == parameters.frequency_penalty == 0
    assert parameters.repetition_penalty == 1
    assert parameters.sampling_seed is not None
    assert parameters.max_new_tokens == 8


def test_the_vendors_neutral_value_is_refused_there() -> None:
    with pytest.raises(ValueError, match="top_k must be -1"):
        SglangSampling(top_k=0).verify(VOCABULARY)


def test_the_recorded_answers_are_sglangs() -> None:
    told = api_types.GenerateResponse.from_json_value(answers.sglang())
    assert told.to_json_value()["output_ids"] == [*IDS]
    kind = sglang_openai.ChatCompletionResponse
    chat = answers.sglang_chat()
    model = TypeAdapter(kind).validate_python(chat)
    assert not chat.keys() - kind.model_fields.keys()
    [choice] = chat["choices"]
    assert not choice.keys() - type(model.choices[0]).model_fields.keys()
    check_read("sglang", "chat", model.model_dump(mode="json"))


def test_sglangs_own_spans_of_a_straddled_request_are_read() -> None:
    events = [weight_versions.WeightVersionEvent(old_version="run-1", num_output_tokens=1)]
    spans = weight_versions.compute_weight_version_spans(events, IDENTITY, 2)
    meta = answers.sglang_meta()
    weight_versions.add_weight_versions_to_meta_info(meta, spans, 2)
    answer = check_read("sglang", "ids", answers.sglang(meta), runs=[(0, "run-1"), (1, IDENTITY)])
    assert answer.observed == ["run-1", IDENTITY]
    chat = answers.sglang_chat()
    chat["metadata"] = weight_versions.build_endpoint_weight_version_metadata(meta)
    check_read("sglang", "chat", chat, runs=[(0, "run-1"), (1, IDENTITY)])


def check_read(engine: str, form: str, *chunks: dict[str, Any], runs: Any = None) -> Answer:
    problem = PROBLEMS[form]
    prompt = problem.prompt if isinstance(problem.prompt, tuple) else None
    answer = Answer(Sampling(), prompt, KINDS[engine].endpoints[form_of(problem)].reading)
    assert answer.add(*chunks) is None
    answer.is_done = True
    assert answer.finish() is None
    assert (answer.prompt_token_ids, answer.token_ids) == (PROMPT, IDS)
    assert answer.sampling_logprobs == pytest.approx(LOGPROBS)
    assert answer.runs == (runs or [(0, IDENTITY)])
    return answer


@pytest.mark.parametrize("recorded", [one for one in RECORDED if one.names_weights], ids=str)
def test_the_recorded_answers_are_read(recorded: Recorded) -> None:
    check_read(recorded.engine, recorded.form, *recorded.chunks)
