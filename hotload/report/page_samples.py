"""Prepares single samples of a cycle for its page: who said what, turn by turn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hotload.quantities import plural

MESSAGES_SHOWN = 12

Utterance = tuple[str, str, str]
"""Who wrote a text, the text, and a class of the style sheet."""


def utterances(facts: Mapping[str, Any]) -> Iterable[Utterance]:
    """Yield the texts of a sample, given as the columns of its first row."""
    turns = _messages(facts["transcript"])
    yield from _turns(turns or _messages(facts["prompt"]))
    if not turns:
        if facts["prompt"] and not _messages(facts["prompt"]):
            yield "prompt", facts["prompt"], ""
        yield "answer of the model", facts["text"], "model"
    if facts["answer"] is not None:
        answer = json.loads(facts["answer"])
        yield "expected", answer if isinstance(answer, str) else facts["answer"], ""
    if facts["failure"] and facts["detail"]:
        yield "why it failed", facts["detail"], "bad"


def _turns(messages: list[dict[str, Any]]) -> Iterable[Utterance]:
    # The beginning sets the scene and the end decides; the middle is what may be missed.
    half = MESSAGES_SHOWN // 2
    left = len(messages) - MESSAGES_SHOWN
    yield from map(_message, messages if left <= 0 else messages[:half])
    if left > 0:
        yield f"… {plural(left, 'message')} left out", "", "gap"
        yield from map(_message, messages[-half:])


def _message(message: dict[str, Any]) -> Utterance:
    role = str(message.get("role", "message"))
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    rest = {name: each for name, each in message.items() if name not in ("role", "content")}
    if rest:
        text = f"{text if content else ''}\n{json.dumps(rest, ensure_ascii=False)}".strip()
    return role, text, "model" if role == "assistant" else ""


def _messages(text: str | None) -> list[dict[str, Any]]:
    """The messages in `text`, if it is JSON of such."""
    try:
        messages = json.loads(text or "")
    except (ValueError, RecursionError):
        return []
    is_chat = isinstance(messages, list) and all(isinstance(each, dict) for each in messages)
    return messages if is_chat else []
