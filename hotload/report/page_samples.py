"""One sample of a cycle as a piece of HTML. Every text in it is somebody else's: all is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hotload.dataset.table import weights_told
from hotload.quantities import duration, number, plural
from hotload.report.markup import safe
from hotload.report.sample_statistics import Shown

TEXT_LIMIT = 2400
MESSAGES_SHOWN = 12


def article(shown: Shown) -> str:
    """The sample with its problem, its text or turns, and what is known about it."""
    facts = shown.facts
    heading = f"problem {facts['problem_id']}, sample {facts['sample_number']}"
    chips = [f'<span class="chip">{safe(why)}</span>' for why in shown.why]
    if facts["failure"]:
        cause = facts["failure"].replace("_", " ")
        chips.append(f'<span class="chip bad">{safe(cause)}</span>')
    if facts["mark"]:
        chips.append(f'<span class="chip">group {safe(facts["mark"])}</span>')
    return (
        f"<article><header><h3>{safe(heading)}</h3>{''.join(chips)}</header>"
        f"{''.join(_said(facts))}"
        f'<p class="foot">{safe(_told(facts))}</p></article>'
    )


def _said(facts: Mapping[str, Any]) -> Iterable[str]:
    turns = _messages(facts["transcript"])
    if turns:
        yield from _turns(turns)
    else:
        prompt = _messages(facts["prompt"])
        if prompt:
            yield from _turns(prompt)
        elif facts["prompt"]:
            yield _block("prompt", facts["prompt"], "")
        yield _block("answer of the model", facts["text"], "model")
    if facts["answer"] is not None:
        yield _block("expected", _plain(facts["answer"]), "")
    if facts["failure"] and facts["detail"]:
        yield _block("why it failed", facts["detail"], "bad")


def _turns(messages: list[dict[str, Any]]) -> Iterable[str]:
    # The beginning sets the scene and the end decides; the middle is what may be missed.
    head = messages if len(messages) <= MESSAGES_SHOWN else messages[: MESSAGES_SHOWN // 2]
    tail = [] if head is messages else messages[-MESSAGES_SHOWN // 2 :]
    for message in head:
        yield _message(message)
    if tail:
        left = len(messages) - len(head) - len(tail)
        yield f'<div class="said"><em>… {plural(left, "message")} left out</em></div>'
    for message in tail:
        yield _message(message)


def _message(message: dict[str, Any]) -> str:
    role = str(message.get("role", "message"))
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    rest = {name: each for name, each in message.items() if name not in ("role", "content")}
    if rest:
        text = f"{text if content else ''}\n{json.dumps(rest, ensure_ascii=False)}".strip()
    return _block(role, text, "model" if role == "assistant" else "")


def _block(who: str, text: str, kind: str) -> str:
    shown = text[:TEXT_LIMIT]
    more = ""
    if len(text) > TEXT_LIMIT:
        more = f"<em>… {len(text) - TEXT_LIMIT:,} more characters</em>"
    body = f"<pre>{safe(shown)}</pre>" if shown else "<em>nothing</em>"
    return f'<div class="said {kind}"><b>{safe(who)}</b>{body}{more}</div>'


def _messages(text: str | None) -> list[dict[str, Any]]:
    """The messages in `text`, if it is JSON of such."""
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return []
    is_chat = isinstance(found, list) and all(isinstance(each, dict) for each in found)
    return found if is_chat else []


def _plain(answer: str) -> str:
    """A text without its quotes, anything else as the JSON it is."""
    value = json.loads(answer)
    return value if isinstance(value, str) else answer


def _told(facts: Mapping[str, Any]) -> str:
    told = []
    if facts["reward"] is not None:
        parts = ", ".join(
            f"{each['name']} {number(each['value'])}" for each in facts["reward_parts"]
        )
        told.append(f"reward {number(facts['reward'])}" + (f" ({parts})" if parts else ""))
    if facts["advantage"] is not None:
        told.append(f"advantage {number(facts['advantage'])}")
    told.append(plural(facts["completion_token_count"], "token"))
    if facts["turn_count"] > 1:
        told.append(plural(facts["turn_count"], "turn"))
    told.append(duration(facts["latency_seconds"]))
    if facts["attempts"] > 1:
        told.append(plural(facts["attempts"], "request"))
    if facts["finish_reason"]:
        told.append(f"ended by {facts['finish_reason']}")
    if made := weights_told(facts["weights"], facts["identity"], facts["identities"]):
        told.append(made)
    return " · ".join(told)
