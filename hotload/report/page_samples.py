"""One sample of a cycle as a piece of HTML. Every text in it is somebody else's: all is escaped."""

from __future__ import annotations

from collections.abc import Iterable

from hotload.dataset.sample_extracts import SampleExtract
from hotload.quantities import duration, number, plural
from hotload.report.markup import safe
from hotload.report.sample_statistics import ShownSample


def article(shown: ShownSample) -> str:
    """The sample with its problem, its text or turns, and what is known about it."""
    extract = shown.extract
    heading = f"problem {extract.problem_id}, sample {extract.sample_number}"
    chips = [f'<span class="chip">{safe(why)}</span>' for why in shown.reasons]
    if extract.failure:
        cause = extract.failure.replace("_", " ")
        chips.append(f'<span class="chip bad">{safe(cause)}</span>')
    if extract.mark:
        chips.append(f'<span class="chip">group {safe(extract.mark)}</span>')
    return (
        f"<article><header><h3>{safe(heading)}</h3>{''.join(chips)}</header>"
        f"{''.join(_said(extract))}"
        f'<p class="foot">{safe(_told(extract))}</p></article>'
    )


def _said(extract: SampleExtract) -> Iterable[str]:
    for role, text in extract.messages:
        yield _block(role, text, "model" if role in ("assistant", "answer of the model") else "")
    if extract.expected is not None:
        yield _block("expected", extract.expected, "")
    if extract.failure and extract.detail:
        yield _block("why it failed", extract.detail, "bad")


def _block(who: str, text: str, kind: str) -> str:
    body = f"<pre>{safe(text)}</pre>" if text else "<em>nothing</em>"
    return f'<div class="said {kind}"><b>{safe(who)}</b>{body}</div>'


def _told(extract: SampleExtract) -> str:
    told = []
    if extract.reward is not None:
        named = sorted(extract.reward_parts.items())
        parts = ", ".join(f"{name} {number(value)}" for name, value in named)
        told.append(f"reward {number(extract.reward)}" + (f" ({parts})" if parts else ""))
    if extract.advantage is not None:
        told.append(f"advantage {number(extract.advantage)}")
    told.append(plural(extract.completion_token_count, "token"))
    if extract.turn_count > 1:
        told.append(plural(extract.turn_count, "turn"))
    told.append(duration(extract.latency_seconds))
    if extract.attempts > 1:
        told.append(plural(extract.attempts, "request"))
    if extract.finish_reason:
        told.append(f"ended by {extract.finish_reason}")
    if extract.weights:
        told.append(extract.weights)
    return " · ".join(told)
