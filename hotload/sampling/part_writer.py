"""Part writer: the settled groups of one part, on their way into its files.

Groups are written as they finish, in files that are whole or not there. What an earlier run of the
cycle has written is found, and what is left to do follows from it.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from hotload.clients.store.store import Store
from hotload.dataset.part_progress import PartProgress
from hotload.dataset.rollout_plan import PartPlan, RolloutPart, RolloutPlan
from hotload.dataset.sample_extracts import SampleExtract, merge_extracts
from hotload.errors import StoreUnavailableError
from hotload.rollout.counts import count_failures
from hotload.rollout.group_rules import SettledGroup, is_unanswered
from hotload.rollout.trajectory import Problem
from hotload.sampling.part_files import PartFile, read_parts, write_part

# About 20 MB of Python objects.
FULL_TOKENS = 1 << 18


class PartWriter:
    """One part of a rollout: its groups as they are settled, and its files."""

    def __init__(self, store: Store, plan: RolloutPlan, part: PartPlan) -> None:
        self.part = part
        self.parts: list[RolloutPart] = []
        """The files there are."""
        self.found: tuple[RolloutPart, ...] = ()
        """Those of them that an earlier run wrote."""
        self.extracts: tuple[SampleExtract, ...] = ()
        """Samples of them to show."""
        self.is_read = False
        """Whether what an earlier run wrote is known."""
        self.progress = PartProgress(part)
        self._store, self._plan = store, plan
        self._seen: set[str] = set()
        self._left_out: Counter[str] = Counter()
        self._unwritten: list[SettledGroup] = []
        self._tried_count = 0
        self._unanswered: list[SettledGroup] = []
        self._unwritten_tokens = 0
        self._is_refused = False
        self._oldest_at = 0.0
        self._one_at_a_time = asyncio.Lock()

    async def find(self, names: Sequence[str], named: Mapping[str, RolloutPart]) -> None:
        """Look among the files `names` for those that were not looked at: what an earlier run has
        written, and when asked again, what was written elsewhere since.

        Args:
            named: entries of a manifest by file: a reader may have their groups already.
        """
        new = [name for name in names if name not in self._seen]
        read = await read_parts(self._store, self._plan, self.part, new, named)
        self._seen.update(new)
        for found in sorted(read, key=lambda found: found.part.file not in named):
            if self.progress.find(found.problem_ids, found.dropped_problem_ids):
                self._add(found)
        if not self.is_read:
            self.found = tuple(self.parts)
        self.is_read = True

    def take(self, settled: SettledGroup) -> Problem | None:
        """Keep a group that has ended; the row to sample in its place, if it was dropped and there
        is one.
        """
        group = settled.group
        instead = self.progress.settle(group.problem, is_dropped=settled.is_dropped)
        if is_unanswered(group.trajectories_G):
            self._unanswered.append(settled)
            return instead
        if not self._unwritten:
            self._oldest_at = _now()
        self._unwritten.append(settled)
        self._unwritten_tokens += _tokens(settled)
        return instead

    @property
    def is_full(self) -> bool:
        """Whether what is not written is enough for a file."""
        return self._unwritten_tokens >= FULL_TOKENS

    @property
    def waits_seconds(self) -> float:
        """Seconds that a settled group has waited to be written."""
        return _now() - self._oldest_at if self._unwritten else 0.0

    @property
    def is_held_up(self) -> bool:
        """Whether a file's worth waits for a store that did not answer."""
        return self._is_refused and self.is_full

    def leave_out(self, problem: Problem, why: Counter[str]) -> None:
        """Leave a problem's samples for a later run."""
        self.progress.leave_out(problem)
        self._left_out += why

    @property
    def missing(self) -> Counter[str]:
        """Samples that are not recorded, by cause: left out, or held back without an answer."""
        held_back = (count_failures(each.group.trajectories_G) for each in self._unanswered)
        return sum(held_back, Counter[str]()) + self._left_out

    @property
    def example(self) -> str:
        """What the first of the samples that are held back met; nothing where none is."""
        held_back = (sample for each in self._unanswered for sample in each.group.trajectories_G)
        return next((sample.detail for sample in held_back if sample.detail), "")

    def keep_unanswered(self) -> None:
        """Keep groups that were held back: they are written with the next file."""
        self._unwritten += self._unanswered
        self._unanswered = []

    async def write(self) -> bool:
        """Write what is settled, and tell whether there was something; it is in the store now.

        Raises:
            StoreError: the store refuses; the groups are kept for another call.
        """
        async with self._one_at_a_time:
            waiting_count = left_count = len(self._unwritten)
            while left_count > 0:
                left_count -= await self._write()
            return waiting_count > 0

    async def make_room(self) -> bool:
        """Write once there is enough for a file, unless that is held up; whether it was written.

        Raises:
            StoreError: the store refuses for good.
        """
        async with self._one_at_a_time:
            if not self.is_full or self.is_held_up:
                return False
            try:
                return await self._write() > 0
            except StoreUnavailableError:
                return False

    async def _write(self) -> int:
        """Write one file; how many groups are in it.

        What was tried before is tried again as it was: the store may have it, though it did not say
        so, and a file with those groups and others would then stand beside it.
        """
        count = self._tried_count = self._tried_count or len(self._unwritten)
        settled = self._unwritten[:count]
        files = {each.file for each in self.parts}
        piece = next(n for n in itertools.count() if self.part.file(n) not in files)
        try:
            written = await write_part(self._store, self._plan, self.part, piece, settled)
        except StoreUnavailableError:
            self._is_refused = True
            raise
        self._is_refused, self._tried_count = False, 0
        self._add(written)
        # Groups that ended in the meantime are behind those that were written.
        del self._unwritten[:count]
        self._unwritten_tokens = sum(map(_tokens, self._unwritten))
        self._oldest_at = _now()
        return count

    def _add(self, file: PartFile) -> None:
        self.parts.append(file.part)
        self.extracts = merge_extracts((*self.extracts, *file.extracts))

    @property
    def is_answered(self) -> bool:
        """Whether a group of the part got an answer, now or in an earlier run."""
        return bool(self.parts or self._unwritten)


def _tokens(settled: SettledGroup) -> int:
    """Tokens to be written of a group, prompts included."""
    if settled.is_dropped:
        return 0
    return sum(
        len(segment.prompt_token_ids) + len(segment.token_ids_T)
        for sample in settled.group.trajectories_G
        for segment in sample.segments
    )


def _now() -> float:
    """Seconds of the event loop's clock."""
    return asyncio.get_running_loop().time()
