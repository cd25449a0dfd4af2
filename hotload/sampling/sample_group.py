"""Sample a group: its G draws side by side, under its rules (`rollout.group_rules` decides)."""

import asyncio
from collections.abc import Callable, Mapping

from hotload.options import Groups
from hotload.rollout.failures import Cause
from hotload.rollout.group_rules import GroupTally, draw_number, seconds_to_hedge, to_ask_again
from hotload.rollout.trajectory import Problem, Trajectory, TrajectoryGroup
from hotload.sampling.draw import Draw, Drawing
from hotload.sampling.row_gate import Gate


class GroupSampler:
    """Samples groups of `size`, each begun with its draws counted at the gate.

    Args:
        may_ask_again: whether missing samples are worth another request now.
    """

    def __init__(
        self,
        drawing: Drawing,
        rules: Groups,
        size: int,
        gate: Gate,
        may_ask_again: Callable[[], bool],
    ) -> None:
        self._drawing = drawing
        self._rules = rules
        self._size = size
        self._gate = gate
        self._may_ask_again = may_ask_again

    async def sample(self, problem: Problem) -> tuple[TrajectoryGroup, GroupTally]:
        """Sample the group, failed samples included, and count what the rules did to get it.

        Raises:
            ServiceError: no sample can succeed.
        """
        try:
            return await self._sample(problem)
        finally:
            self._gate.end_row()

    async def _sample(self, problem: Problem) -> tuple[TrajectoryGroup, GroupTally]:
        tally = GroupTally()
        deadline = self._rules.deadline_seconds
        ends_at = None if deadline is None else _now() + deadline
        numbers = {position: position for position in range(self._size)}
        drawn = await _Round(self, problem, numbers, ends_at, tally).samples()
        samples_G = [drawn[position] for position in range(self._size)]
        round_number = 0
        while self._may_ask_again() and (ends_at is None or _now() < ends_at):
            positions = to_ask_again(samples_G, self._rules, round_number)
            if not positions:
                break
            round_number += 1
            self._gate.begin(len(positions))
            numbers = {each: draw_number(each, round_number, self._size) for each in positions}
            drawn = await _Round(self, problem, numbers, ends_at, tally).samples()
            for position, sample in drawn.items():
                tally.replace(samples_G[position])
                samples_G[position] = sample
        return TrajectoryGroup(problem, tuple(samples_G)), tally


class _Round:
    """Draws that are waited for together; a hedge may join them."""

    def __init__(
        self,
        sampler: GroupSampler,
        problem: Problem,
        numbers: Mapping[int, int],
        ends_at: float | None,
        tally: GroupTally,
    ) -> None:
        self._drawing, self._rules, self._gate = sampler._drawing, sampler._rules, sampler._gate
        self._problem = problem
        self._numbers = numbers
        self._ends_at = ends_at
        self._tally = tally
        self._running: dict[asyncio.Task[Trajectory], tuple[int, Draw, bool]] = {}
        self._settled: dict[int, Trajectory] = {}
        self._cut: list[asyncio.Task[Trajectory]] = []
        self._alone_since: float | None = None
        self._is_hedged = False

    async def samples(self) -> dict[int, Trajectory]:
        """Return a sample for every position."""
        # Nobody has to look at every single answer where none can call for a hedge.
        hedges = self._rules.hedge_after_seconds is not None
        when = asyncio.FIRST_COMPLETED if hedges else asyncio.FIRST_EXCEPTION
        try:
            for position in self._numbers:
                self._begin(position, is_hedge=False)
            while self._running:
                done, _ = await asyncio.wait(
                    self._running, timeout=self._patience(), return_when=when
                )
                for task in done:
                    if task in self._running:
                        self._take(task)
                if not done:
                    self._lose_patience()
        finally:
            unfinished = [*self._cut, *self._running]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        return self._settled

    def _begin(self, position: int, *, is_hedge: bool) -> None:
        draw = self._drawing.begin(self._problem, self._numbers[position], is_hedge=is_hedge)
        task = asyncio.ensure_future(draw.answer())
        # Not when its round has ended: the slowest of a group would hold back the next row.
        task.add_done_callback(lambda _: self._gate.end())
        self._running[task] = position, draw, is_hedge

    def _patience(self) -> float | None:
        """Seconds until something is to be done although nothing came."""
        now = _now()
        left = None if self._ends_at is None else max(0.0, self._ends_at - now)
        hedge = self._seconds_to_hedge(now)
        return min((each for each in (left, hedge) if each is not None), default=None)

    def _seconds_to_hedge(self, now: float) -> float | None:
        pending = {position for position, _, _ in self._running.values()}
        if len(pending) == 1 and self._alone_since is None:
            self._alone_since = now
        alone = now - (self._alone_since or now)
        return seconds_to_hedge(len(pending), alone, self._rules, is_hedged=self._is_hedged)

    def _lose_patience(self) -> None:
        if self._ends_at is not None and _now() >= self._ends_at:
            detail = f"the group's {self._rules.deadline_seconds:g} s were up"
            for task, (position, draw, _) in list(self._running.items()):
                self._settle(position, draw.cut_off(Cause.DEADLINE, detail))
                self._cut_off(task)
        elif self._seconds_to_hedge(_now()) == 0:
            (position,) = {position for position, _, _ in self._running.values()}
            self._is_hedged = True
            self._tally.hedges += 1
            self._gate.begin(1)
            self._begin(position, is_hedge=True)

    def _take(self, task: asyncio.Task[Trajectory]) -> None:
        position, draw, is_hedge = self._running.pop(task)
        sample = task.result()
        twin = next((t for t, (p, _, _) in self._running.items() if p == position), None)
        if twin is not None and sample.failure is not None:
            self._tally.leave_out(draw)  # the other may still answer
            return
        self._settle(position, sample)
        self._tally.hedges_won += is_hedge and sample.failure is None
        if twin is not None:
            self._tally.leave_out(self._running[twin][1])
            self._cut_off(twin)

    def _cut_off(self, task: asyncio.Task[Trajectory]) -> None:
        _, draw, _ = self._running.pop(task)
        draw.close()
        if task.cancel():  # not where it ended at the same moment
            self._tally.cut_off += 1
        self._cut.append(task)

    def _settle(self, position: int, sample: Trajectory) -> None:
        if position in self._settled:  # both of a pair were cut off
            self._tally.leave_out(sample.provenance)
            return
        self._settled[position] = sample


def _now() -> float:
    """Seconds of the event loop's clock, which its timeouts go by."""
    return asyncio.get_running_loop().time()
