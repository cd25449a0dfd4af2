"""A replica's prompt cache, and what a swap leaves of it (protocol §9)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LIMIT_BYTES = 64 << 20
LIMIT_ENTRIES = 4096
HEAD_TOKENS = 8


@dataclass(slots=True)
class Entry:
    """Tokens whose keys and values are held; `is_private` entries serve their own session only."""

    tokens: Sequence[int]
    cache: Any
    is_private: bool


class PromptCache:
    """One entry per session, and the newest of each prompt head for everybody else.

    A prefix computed before a swap is, after a swap with policy `all`, gone; with `new_session`,
    left to the sessions that made it; with `none`, left to everybody.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._newest: dict[tuple[int, ...], str] = {}
        self._size_bytes = 0
        self._wiped = self._closed = 0

    @property
    def generation(self) -> tuple[int, int]:
        """To be read when a request begins and handed to `put` when it ends."""
        return self._wiped, self._closed

    def swap(self, policy: str) -> None:
        """Apply the policy of a load whose weights are served from now on."""
        if policy == "all":
            self._entries.clear()
            self._newest.clear()
            self._size_bytes = 0
            self._wiped += 1
        elif policy == "new_session":
            for entry in self._entries.values():
                entry.is_private = True
            self._closed += 1

    def find(self, prompt: Sequence[int], session: str | None) -> tuple[Any, int]:
        """Find a cache and how many leading tokens of `prompt` it serves; (None, 0) if there is
        none.

        The last token of a prompt is always computed.
        """
        own = self._entries.get(session) if session is not None else None
        other = self._entries.get(self._newest.get(tuple(prompt[:HEAD_TOKENS]), ""))
        best, length = None, 0
        for entry in (own, other):
            if entry is None or (entry.is_private and entry is not own):
                continue
            common = _common(entry.tokens, prompt[:-1], entry.cache.length)
            if common > length:
                best, length = entry.cache, common
        return best, length

    def put(
        self, tokens: Sequence[int], cache: Any, session: str, generation: tuple[int, int]
    ) -> None:
        """Keep what a request computed, unless a swap since it began forbids it."""
        wiped, closed = generation
        if wiped != self._wiped:
            return
        previous = self._entries.pop(session, None)
        if previous is not None:
            self._size_bytes -= previous.cache.size_bytes
        self._entries[session] = Entry(tokens, cache, closed != self._closed)
        self._newest[tuple(tokens[:HEAD_TOKENS])] = session
        self._size_bytes += cache.size_bytes
        while self._size_bytes > LIMIT_BYTES or len(self._entries) > LIMIT_ENTRIES:
            oldest, entry = self._entries.popitem(last=False)
            self._size_bytes -= entry.cache.size_bytes
            head = tuple(entry.tokens[:HEAD_TOKENS])
            if self._newest.get(head) == oldest:
                del self._newest[head]


def _common(held: Sequence[int], prompt: Sequence[int], limit: int) -> int:
    count = 0
    for left, right in zip(held, prompt, strict=False):
        if left != right or count == limit:
            break
        count += 1
    return count
