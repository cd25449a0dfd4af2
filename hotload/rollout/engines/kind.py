"""A kind of inference server: how it is asked, how its answers are spelt, and what they mean.

A module beside this one holds one family of servers as literal tables; `known` lists them all. A
chunk of an answer is spelt as the vendor spells it (protocol §12) before the client takes it in, so
that whoever answered, one path reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hotload.publish import fireworks_names
from hotload.rollout.completions_api import AS_THE_VENDOR, Reading
from hotload.rollout.request import Request
from hotload.rollout.trajectory import Problem


class PromptForm(StrEnum):
    """What a request asks."""

    IDS = "token ids"
    TEXT = "text"
    CHAT = "a chat"


@dataclass(frozen=True, slots=True)
class InferenceEndpoint:
    """Where one form of request goes, what writes its body out of request and model, and how the
    answer is read.
    """

    path: str
    body: Callable[[Request, str], dict[str, Any]]
    reading: Reading = AS_THE_VENDOR


@dataclass(frozen=True, slots=True)
class ServerKind:
    """One kind of server.

    A form that has no endpoint cannot be trained on and is refused, with `advice`: what has to be
    switched on at the server, or asked otherwise.
    """

    name: str
    endpoints: Mapping[PromptForm, InferenceEndpoint]
    advice: str = ""
    certain: Mapping[str, float] | None = None
    """Settings under which every token's log-probability is 0, if it is of the distribution that
    was sampled, where only a question can tell."""
    tells_routes: bool = False
    """Whether it can tell the experts of each token (`include_routing_matrix`)."""
    request_id_header: str = fireworks_names.REQUEST_ID_HEADER
    session_headers: tuple[str, ...] = (
        fireworks_names.SESSION_HEADER,
        fireworks_names.AFFINITY_HEADER,
    )


def form_of(problem: Problem) -> PromptForm:
    """Tell what a problem asks."""
    if problem.messages is not None:
        return PromptForm.CHAT
    return PromptForm.TEXT if isinstance(problem.prompt, str) else PromptForm.IDS


def asked_of(problem: Problem) -> dict[str, Any]:
    """Say what a problem asks in the words of OpenAI's endpoints."""
    if problem.messages is None:
        is_text = isinstance(problem.prompt, str)
        return {"prompt": problem.prompt if is_text else list(problem.prompt or ())}
    asked: dict[str, Any] = {"messages": list(problem.messages)}
    if tools := problem.extra.get("tools"):
        asked["tools"] = tools
    return asked
