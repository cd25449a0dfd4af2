"""The turns of one trajectory, put together into as few sequences as they form (protocol §12)."""

from __future__ import annotations

from hotload.rollout.completions_api import Answer
from hotload.rollout.routing import extend_routes
from hotload.rollout.trajectory import EMPTY_SEGMENT, Segment


class Turns:
    """What the answers so far come to.

    A turn whose prompt begins with all ids so far goes on with their sequence; what is new between
    them gets a loss mask of False, a log-probability of 0 and, unless the service told it, no
    route. Any other turn begins a new sequence.
    """

    def __init__(self) -> None:
        self.text = ""
        """Of the last turn."""
        self.finish_reason: str | None = None
        self.prompt_token_count = self.cached_prompt_token_count = 0
        self.completion_token_count = 0
        self.observed: tuple[str, ...] = ()
        self.last_identity: str | None = None
        self.replica: str | None = None
        self.response_id: str | None = None
        self.runs: tuple[tuple[int, str], ...] = ()
        self._done: tuple[Segment, ...] = ()
        self._open = EMPTY_SEGMENT

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The sequences, in order; at least one."""
        return (*self._done, self._open) if self._open.token_ids_T or not self._done else self._done

    def note(self, answer: Answer) -> None:
        """Take in who answered, be the answer of use or not."""
        if answer.observed:
            self.observed = tuple(dict.fromkeys((*self.observed, *answer.observed)))
        self.last_identity = answer.last_identity or self.last_identity
        self.replica = answer.replica or self.replica
        self.response_id = answer.response_id or self.response_id

    def take(self, answer: Answer) -> None:
        """Add the tokens of a good answer."""
        so_far, prompt = self._open, answer.prompt_token_ids
        sampled = (answer.token_ids, tuple(answer.sampling_logprobs))
        mask = (True,) * len(answer.token_ids)
        known = so_far.prompt_token_ids + so_far.token_ids_T
        if so_far.token_ids_T and prompt[: len(known)] == known:
            between = prompt[len(known) :]
            self._open = Segment(
                so_far.prompt_token_ids,
                so_far.token_ids_T + between + sampled[0],
                so_far.sampling_logprobs_T + (0.0,) * len(between) + sampled[1],
                so_far.loss_mask_T + (False,) * len(between) + mask,
                _extended(so_far.routes, len(known), answer),
            )
        else:
            if so_far.token_ids_T:
                self._done += (so_far,)
            self._open = Segment(prompt, *sampled, mask, answer.routes)
        start = sum(len(segment.token_ids_T) for segment in self.segments) - len(mask)
        # An empty identity says that none was named, where one was before.
        for number, identity in answer.runs or ([(0, "")] if self.runs and mask else []):
            if not self.runs or self.runs[-1][1] != identity:
                self.runs += ((start + number, identity),)
        self.text, self.finish_reason = answer.text, answer.finish_reason
        self.prompt_token_count += len(prompt)
        self.cached_prompt_token_count += min(answer.cached_prompt_token_count, len(prompt))
        self.completion_token_count += len(mask)


def _extended(before: bytes | None, before_count: int, answer: Answer) -> bytes | None:
    """The routes of the sequence once the answer is part of it, where every turn told some."""
    if before is None or (answer.token_ids and answer.routes is None):
        return None
    count = len(answer.prompt_token_ids) + len(answer.token_ids)
    return extend_routes(before, before_count, answer.routes, count)
