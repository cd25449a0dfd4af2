"""Rollouts over nodes, each here an event loop's tasks beside the cycle's: what a node leaves, what
the cycle makes of it, and what they tell each other."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prefect.logging import disable_run_logger

from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import RolloutPlan
from hotload.errors import RolloutsFailedError, StoreError
from hotload.options import Sampling
from hotload.sampling.nodes import share
from hotload.sampling.nodes.coordinator import RolloutNodes, even_out
from hotload.sampling.nodes.notes import NodeNote, SamplingShare
from hotload.sampling.nodes.share import NamedElsewhere, NodeRollout
from hotload.sampling.part_carrier import PartCarrier, RolloutState, Together
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.processes.coordinator import open_carrier
from hotload.sampling.rollout import Rollout, SampledService, open_rollout
from hotload.sampling.stamp import Stamp
from hotload.spec import CycleSpec
from tasks.roll_out import find_files, roll_out_part
from tests.blocks.scripted_inference import IDENTITY, NO_IDS, client, saying
from tests.scripted_server import Reply, Request, ScriptedServer
from tests.tasks.bench import Bench, carry_all, replying
from tests.waiting import until

LOGGER = logging.getLogger("tests.sampling_nodes")
NEXT = "run-000004-0badf00d"
FOUR_SLOTS = {"mode": "fixed", "initial_window": 4}


def number_of(asked: Request) -> int:
    return int(asked.prompt.rpartition(" ")[2])


class Machines:
    """A cycle and its nodes."""

    def __init__(self, bench: Bench, spec: CycleSpec, plan: RolloutPlan, port: int) -> None:
        self.store, self._spec, self.plan, self._port = bench.store, spec, plan, port
        self.together = Together(plan, bench.store, LOGGER)
        self.settled = 0
        source = SampledService(client(port), IDENTITY, name="default")
        self.cycle = RolloutNodes(
            spec, plan, [source], bench.store, LOGGER, self.together, self._advance
        )

    async def _advance(self, count: int) -> None:
        self.settled += count

    @asynccontextmanager
    async def node(self, work: SamplingShare) -> AsyncIterator[PartCarrier]:
        """What a node does, without Prefect."""
        (service,) = work.services
        async with (
            open_carrier(
                work.spec_of(service),
                self.plan,
                SampledService(client(self._port), IDENTITY),
                self.store,
                LOGGER,
                numbers=service.parts,
                together=NamedElsewhere(self.plan, self.store),
                service_count=1,
            ) as rollout,
            NodeRollout(work, {"default": rollout}, self.store).listening(),
        ):
            yield rollout

    async def sample(self, work: SamplingShare) -> None:
        """Sample a share on a node."""
        async with self.node(work) as rollout:
            await overlap(roll_out_part.fn(rollout, number) for number in work.services[0].parts)

    async def go_on(self) -> None:
        """Go on in the cycle itself."""
        self.together.begin_again()
        async with open_rollout(
            self._spec,
            self.plan,
            SampledService(client(self._port), IDENTITY),
            self.store,
            together=self.together,
        ) as rollout:
            await carry_all(rollout)


@asynccontextmanager
async def machines(bench: Bench, spec: CycleSpec, reply: Reply) -> AsyncIterator[Machines]:
    plan = await plan_rollouts(spec, IDENTITY)
    with disable_run_logger():
        async with ScriptedServer(reply).running() as server:
            found = Machines(bench, spec, plan, server.port)
            await find_files.fn(found.cycle)
            yield found


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_what_nodes_have_put_is_named_and_the_rest_is_sampled_here(
    bench: Bench, processes: int
) -> None:
    nodes = {"nodes": ("a", "b", "c"), "processes": processes}
    spec = bench.spec(8, problems_per_task=2, concurrency=FOUR_SLOTS, **nodes)
    asked: Counter[int] = Counter()

    def answer(request: Request) -> bytes:
        number = number_of(request)
        asked[number] += 1
        return NO_IDS if number == 1 and asked[number] <= 2 else saying("ab")

    async with machines(bench, spec, replying(answer)) as run:
        first, second, third = run.cycle.shares()
        dealt = [work.services[0] for work in (first, second, third)]
        assert [one.parts for one in dealt] == [(0, 3), (1,), (2,)]
        assert [one.concurrency.initial_window for one in dealt] == [2, 1, 1]
        async with run.cycle.talking():
            await run.sample(first)
            assert await find_files.fn(run.cycle) == 5
            named = await bench.published()
            assert not named.is_complete
            assert {part.file[:10] for part in named.parts} == {"part-00000", "part-00003"}
            await run.sample(second)
        assert asked == Counter(dict.fromkeys((0, 1, 2, 3, 6, 7), 2))
        # The group without an answer is no node's to record, and the third has put nothing.
        assert await find_files.fn(run.cycle) == 3
        assert run.settled == 5
        assert [work.services[0].parts for work in run.cycle.shares()] == [(0,), (2,)]
        await run.go_on()
        manifest = run.together.manifest(is_complete=True)
    rows = await bench.rows(manifest)
    assert [(row["problem_id"], row["sample_number"]) for row in rows] == [
        (str(problem), sample) for problem in range(8) for sample in range(2)
    ]
    assert manifest.summary.failed_samples == {}
    assert manifest.summary.found_sample_count == 0
    assert asked == Counter(dict.fromkeys(range(8), 2)) + Counter({1: 2})


async def test_a_service_that_fails_row_after_row_is_judged_by_the_cycle(bench: Bench) -> None:
    spec = bench.spec(16, problems_per_task=8, concurrency=FOUR_SLOTS, nodes=("a", "b"))
    async with machines(bench, spec, NO_IDS) as run:
        async with run.cycle.talking():
            await overlap(run.sample(work) for work in run.cycle.shares())
        assert await find_files.fn(run.cycle) == 16
        with pytest.raises(RolloutsFailedError, match="breaker_open"):
            await run.go_on()
    assert await bench.store.names("_hotload/rollouts") == []


async def test_newer_weights_and_slots_are_told_to_nodes(bench: Bench) -> None:
    spec = bench.spec(
        2,
        problems_per_task=1,
        concurrency={"initial_window": 12},
        max_head_offpolicy_versions=1,
        nodes=("a", "b"),
    )
    async with machines(bench, spec, replying(lambda asked: saying("ab"))) as run:
        run.cycle._stamps["default"] = Stamp(NEXT, 4)
        one, other = run.cycle.shares()
        async with run.cycle.talking(), run.node(one) as narrow, run.node(other) as wide:
            assert isinstance(narrow, Rollout)
            assert isinstance(wide, Rollout)
            assert narrow._sampler.identity == wide._sampler.identity == NEXT
            assert narrow.window.size == wide.window.size == 6
            wide.window.shift(10.0)

            async def are_even() -> bool:
                return narrow.window.width == wide.window.width

            await until(are_even)
            # Eleven each, unless a note was overtaken on a busy machine: what one node then gave,
            # or took, the other did not, and both find a width together at the next notes.
            assert 6 < narrow.window.size == wide.window.size < 16


async def test_a_node_ends_without_its_cycle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = asyncio.Event()

    async def first_part(asked: Request) -> bytes:
        if number_of(asked) % 2:
            await held.wait()
        return saying("ab")

    spec = bench.spec(4, problems_per_task=2, concurrency=FOUR_SLOTS, nodes=("a",))
    async with machines(bench, spec, first_part) as run:
        (work,) = run.cycle.shares()
        monkeypatch.setattr(share, "GONE_SECONDS", 0.2)
        with pytest.raises(StoreError, match="nothing new of the cycle"):
            await run.sample(work)  # there was none to begin with
        monkeypatch.undo()
        async with run.cycle.talking():
            sampling = asyncio.create_task(run.sample(work))

            async def is_heard_of() -> bool:
                return run.cycle._notes.keys() == {"a"}

            await until(is_heard_of)
        monkeypatch.setattr(share, "GONE_SECONDS", 0.2)
        with pytest.raises(StoreError, match="it has ended, or died"):
            await sampling
        # What had ended is there.
        assert await find_files.fn(run.cycle) == 2
    held.set()


def test_windows_are_evened_out_without_a_slot_won_or_lost() -> None:
    state = RolloutState()
    notes = {
        "a": NodeNote(number=3, state=state, widths={"one": 9.0, "two": 4.0}),
        "b": NodeNote(number=7, state=state, widths={"one": 2.0}),
        "c": NodeNote(number=1, state=state, widths={"one": 1.0, "two": 6.0}),
    }
    shifts = even_out(notes)
    assert {name: shift.number for name, shift in shifts.items()} == {"a": 3, "b": 7, "c": 1}
    assert [shift.slots for shift in shifts.values()] == [
        {"one": -5.0, "two": 1.0},
        {"one": 2.0},
        {"one": 3.0, "two": -1.0},
    ]
    assert even_out({}) == {}


@pytest.mark.parametrize("width", ["1e308", "-1e308", "4097", "NaN"])
def test_widths_that_no_window_has_are_no_note(width: str) -> None:
    """Of two of them the mean would be infinite, and the cycle would say no more to any node."""
    written = NodeNote(number=1, state=RolloutState(), widths={"one": 9.0}).model_dump_json()
    assert NodeNote.parse_stored(written.encode(), "a.json").widths == {"one": 9.0}
    with pytest.raises(StoreError, match="widths"):
        NodeNote.parse_stored(written.replace("9.0", width).encode(), "a.json")


def test_a_node_is_named_once() -> None:
    with pytest.raises(ValueError, match="a, b, a: name each once"):
        Sampling(nodes=("a", "b", "a"))
