"""Open: what the steps of a training run share, read and loaded before anything is sampled."""

import asyncio
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, TypeVar

import polars as pl
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from hotload.clients.handoff import RolloutReader
from hotload.clients.handoff.usable_groups import StepGroups, UsableGroups
from hotload.clients.metrics.send import WandbLog, open_wandb
from hotload.clients.store import Store
from hotload.clients.store.kept_states import read_removed
from hotload.clients.store.step_records import read_steps
from hotload.clock import monotonic
from hotload.directory.files import remove_tree, write_atomic
from hotload.errors import HotLoadError, TrainerError
from hotload.identity import NamedVersion
from hotload.rollout.counts import GroupCounts
from hotload.rollout.problem_rows import render_problem
from hotload.rollout.trajectory import Problem
from hotload.sampling.problems import read_declared
from hotload.sampling.reward.processes import keep_reward_processes
from hotload.sampling.reward.user_errors import describe_exception, secret_values
from hotload.spec import CycleSpec
from hotload.trainers.declaration import TrainingSpec
from hotload.trainers.loading import load_trainer
from hotload.trainers.trainer import Trainer, TrainerFacts, as_remover, as_replayer
from hotload.training.resume import RunPosition, check_same_run, find_position
from hotload.training.step_record import RunFacts, StepRecord
from hotload.training.windows import Cursor, OpenWindow, TrainingWindow
from tasks import RETRIED

P = ParamSpec("P")
T = TypeVar("T")
RunT = TypeVar("RunT", bound="TrainingRun")

LOOK_SECONDS = 0.2
LEASE_SECONDS = 3600.0
PATIENCE_SECONDS = 7 * 86_400.0
"""Of the reader: the cycle beside it has limits of its own, and ends the trainer with it."""


@dataclass(frozen=True, slots=True)
class StepPlace:
    """Where a step stands in its run, known once its groups are: what its record says of it.

    Args:
        window_size: the problems of the window that its groups are of; the oldest, of several.
        exports_as: the policy version that it exports; None within a window.
        is_end: whether nothing is left to train.
    """

    sampled_version: int
    window_began: Cursor
    window_size: int
    cursor: Cursor
    exports_as: int | None
    is_end: bool
    open_windows: tuple[OpenWindow, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The problems in the order of an epoch, and the position of each by its id."""

    problems: Sequence[Problem]
    positions: Mapping[str, int]


@dataclass(eq=False, repr=False)
class TrainingRun(ABC):
    """A run under way: its declaration, its problems, its trainer, its records so far.

    Args:
        calls: the one thread on which the trainer is called.
    """

    spec: TrainingSpec
    store: Store
    problems: Sequence[Problem]
    records: list[StepRecord]
    calls: ThreadPoolExecutor

    def __post_init__(self) -> None:
        """Begin with what the records say, and without a trainer."""
        exports = (one.checkpoint for one in reversed(self.records))
        self.exported_version = next((one.policy_version for one in exports if one is not None), 0)
        """The version whose weights are the last that were exported."""
        self.trainer_facts: TrainerFacts
        self.trainer: Trainer
        self.reference: Trainer | None = None
        self.reference_facts: TrainerFacts | None = None
        self._sampler_waits_since: float | None = None
        self._waited_before = 0.0
        self.step_under_way = 0
        """The step that the trainer makes, or has made last; 0 before the first."""
        self.idle = GroupCounts()
        """Of the windows that no step was made of."""
        self.wandb: WandbLog | None = None
        """Where the figures of each step go, too."""
        self.lost: set[int] = set()
        """Steps whose state is removed, or about to be, or of no use."""
        self.removed: set[int] = set()
        """Those whose state this process has removed."""
        self.asked_seconds = 0.0
        """Seconds that the trainer was at work since its last step was made."""
        self.page_due_at = 0.0
        """By the monotonic clock."""
        self._epochs: dict[int, EpochOrder] = {}

    async def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the trainer on its thread. A caller that is cancelled waits until the call has
        ended: nothing stops it, and what it holds is to be used again.

        Raises:
            TrainerError: the trainer raised one, or what is no error of ours.
        """
        loop, began = asyncio.get_running_loop(), monotonic()
        running = loop.run_in_executor(self.calls, lambda: call(*args, **kwargs))
        try:
            answer = await asyncio.shield(running)
            self.asked_seconds += monotonic() - began
            return answer
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise
        except TrainerError as error:
            raise self.trainer_error(" ".join([error.reason, *_notes(error)])) from None
        except HotLoadError:
            raise
        except Exception as error:  # noqa: BLE001 - code of theirs may raise anything
            why = describe_exception(error, secret_values(os.environ))
            raise self.trainer_error(" ".join([f"raised {why}", *_notes(error)])) from None

    def trainer_error(self, reason: str) -> TrainerError:
        """Word what went wrong with the trainer: in which step, and where the run goes on."""
        during = f"step {self.step_under_way}: " if self.step_under_way else ""
        after = f"after step {len(self.records)}" if self.records else "from its beginning"
        goes_on = f"Mend it, and start the run again: it goes on {after}"
        return TrainerError(self.spec.trainer.name, f"{during}{reason}. {goes_on}")

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.spec.cycle.run_id

    @property
    def facts(self) -> RunFacts:
        """What must stay the same for it to be the same run."""
        return self.spec.facts(self.trainer_facts, self.reference_facts, self._dataset_sha256)

    @cached_property
    def _dataset_sha256(self) -> str:
        digest = hashlib.sha256()
        for problem in self.problems:
            digest.update(json.dumps(asdict(problem), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    @property
    def next_step(self) -> int:
        """The number of the step to make."""
        return len(self.records) + 1

    @abstractmethod
    async def place(self, made: Sequence[StepGroups]) -> StepPlace:
        """Find where a step of these groups stands, which were just taken."""

    @abstractmethod
    def lag_figures(self, frame: pl.DataFrame) -> Mapping[str, float]:
        """Tell how far the trainer is ahead of what sampled these rows."""

    def go_on_as(self, version: int) -> None:
        """Sample under another version than the one that was recorded, and is spent."""
        self.exported_version = version

    def add(self, record: StepRecord) -> None:
        """Stand where the run stands after this record."""
        self.records.append(record)
        if record.checkpoint is not None:
            self.exported_version = record.checkpoint.policy_version

    def groups_from(self, policy_version: int, epoch: int) -> UsableGroups:
        """Read the groups that a version samples of an epoch's problems, less those that are
        trained by recorded steps."""
        # The run is one consumer whatever process it is in: killed, it goes on with its own leases.
        # A second process of the run is found out by the step record.
        version = NamedVersion(self.run_id, 0, policy_version)
        nonce = hashlib.sha256(json.dumps(version).encode()).hexdigest()[:32]
        reader = RolloutReader(
            self.store,
            self.run_id,
            policy_version,
            consumer="rl-loop",
            groups_per_batch=self.spec.windows.prompt_groups_per_step,
            lease_seconds=LEASE_SECONDS,
            poll_seconds=LOOK_SECONDS,
            patience_seconds=PATIENCE_SECONDS,
            nonce=nonce,
            line=0,
        )
        trained = {one for record in self.records for one in record.trained_from(policy_version)}
        return UsableGroups(reader, self.order(epoch).positions, trained)

    def order(self, epoch: int) -> EpochOrder:
        """Order the problems for an epoch: once, since many take a while."""
        if epoch not in self._epochs:
            order = self.spec.windows.order(epoch, len(self.problems))
            problems = [self.problems[number] for number in order]
            positions = {problem.id: place for place, problem in enumerate(problems)}
            # Windows of the epoch before may be open still.
            kept = {one: known for one, known in self._epochs.items() if one == epoch - 1}
            self._epochs = kept | {epoch: EpochOrder(problems, positions)}
        return self._epochs[epoch]

    async def write_problems(self, policy_version: int, epoch: int, rows: Sequence[int]) -> Path:
        """Write the problems at these positions of an epoch as the file that a version samples."""
        problems, declared = self.order(epoch).problems, self.spec.cycle.problems
        lines = [
            render_problem(problems[place], declared.prompt_field, declared.answer_field)
            for place in rows
        ]
        file = self.spec.problems_of(policy_version)
        await asyncio.to_thread(_write, file, b"".join(lines))
        return file

    async def forget_but(self, kept: Path) -> None:
        """Remove what lies beside this file or directory."""
        # What is published lies in the store; what a trainer resumes from is its state.
        await asyncio.to_thread(_remove_beside, kept)

    def note_sampling(self) -> None:
        """Note that a cycle begins: its sampler waits no longer."""
        self._waited_before = self.sampler_waited()
        self._sampler_waits_since = None

    def note_sampled(self) -> None:
        """Note that no cycle samples: the sampler waits from now on."""
        self._sampler_waits_since = monotonic()

    def sampler_waited(self) -> float:
        """Count the seconds that the sampler has waited for the trainer since this was asked."""
        waited, self._waited_before = self._waited_before, 0.0
        if self._sampler_waits_since is not None:
            since, self._sampler_waits_since = self._sampler_waits_since, monotonic()
            waited += self._sampler_waits_since - since
        return waited


class WindowedRun(TrainingRun):
    """A run whose windows are sampled one after the other, each from the newest weights."""

    def __post_init__(self) -> None:
        """Stand where the last record says."""
        super().__post_init__()
        self.at: RunPosition = find_position(self.records, self.spec.windows, len(self.problems))
        self.groups: UsableGroups
        """Those of the window."""

    async def declare_cycle(self, window: TrainingWindow) -> CycleSpec:
        """Write the window's problems, and declare the cycle that samples them."""
        self.note_sampling()
        version = self.at.version
        await asyncio.to_thread(self.order, window.epoch)  # the sampler's streams do not wait
        self.groups = self.groups_from(version, window.epoch)
        file = await self.write_problems(version, window.epoch, window.rows(version))
        await self.forget_but(self.spec.checkpoint_of(self.exported_version))
        await self.forget_but(file)
        return self.spec.cycle_of(
            version,
            self.exported_version,
            dataset=str(file),
            max_rows=None,
            prompt_groups_per_step=len(window.positions),
        )

    def note_sampled(self) -> None:
        """Note that the cycle of the window has ended, and all of its groups are there."""
        super().note_sampled()
        self.groups.look_now()

    async def place(self, made: Sequence[StepGroups]) -> StepPlace:
        """Find where a step stands. Waits until it is known whether another of its window follows,
        since the last one exports."""
        assert self.at.window is not None
        windows, count = self.spec.windows, len(self.problems)
        is_last = not await self.groups.has_more()
        positions = self.groups.positions
        trained = [positions[problem] for groups in made for problem in groups.problem_ids]
        cursor = (self.at.end if is_last else self.at.cursor).done(trained)
        is_end = is_last and not windows.next_window(cursor, count)
        exports = is_end or (is_last and windows.weight_sync_interval)
        version, size = self.at.version, len(self.at.window.positions)
        return StepPlace(
            version, self.at.began, size, cursor, version + 1 if exports else None, bool(is_end)
        )

    def closing_place(self) -> StepPlace:
        """Find where a record stands that exports what the last step made, all epochs being
        over."""
        last, at = self.records[-1], self.at
        return StepPlace(
            last.sampled_version, last.window_began, last.window_size, at.cursor, at.version, True
        )

    def lag_figures(self, frame: pl.DataFrame) -> Mapping[str, float]:
        """Tell how many optimizer steps the trainer is ahead of what is sampled."""
        steps = sum(record.sampled_version == self.at.version for record in self.records)
        return {"async/version_offset_max": float(steps)}

    def add(self, record: StepRecord) -> None:
        """Stand where the run stands after this record."""
        super().add(record)
        self.at = find_position(self.records, self.spec.windows, len(self.problems))

    def go_on_as(self, version: int) -> None:
        """Sample under another version than the one that was recorded, and is spent: what is not
        done yet, since what was trained on is known by the version that sampled it."""
        super().go_on_as(version)
        self.at = RunPosition.at(version, self.at.cursor, self.spec.windows, len(self.problems))

    def leave_window(self, counts: GroupCounts) -> None:
        """Go on to the next window after one without a usable group, in which so much was
        sampled."""
        self.idle = GroupCounts.total([self.idle, counts])
        count = len(self.problems)
        self.at = RunPosition.at(self.at.version + 1, self.at.end, self.spec.windows, count)


def _notes(error: Exception) -> list[str]:
    return [str(one) for one in getattr(error, "__notes__", ())]


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, data)


def _remove_beside(kept: Path) -> None:
    for each in kept.parent.iterdir():
        if each != kept:
            remove_tree(each)


@asynccontextmanager
async def opened_run(
    spec: TrainingSpec, store: Store, kind: Callable[..., RunT]
) -> AsyncIterator[RunT]:
    """Open a run of this kind, its trainer on a thread that ends with it, as do the reward's
    processes and the one that logs at Weights & Biases."""
    with ThreadPoolExecutor(1, "trainer") as calls:
        async with keep_reward_processes():
            run = await open_run(spec, store, calls, kind)
            run.wandb = await open_wandb(spec.cycle, "training")
            try:
                yield run
            finally:
                if run.wandb is not None and (wrong := await run.wandb.close()):
                    get_run_logger().warning(wrong)


@task(
    cache_policy=NO_CACHE, persist_result=False, task_run_name="open-{spec.cycle.run_id}", **RETRIED
)
async def open_run(
    spec: TrainingSpec, store: Store, calls: ThreadPoolExecutor, kind: Callable[..., RunT]
) -> RunT:
    """Read the problems and the records of a run, and make its trainer.

    Raises:
        InvalidProblemsError: the problems cannot be used.
        TrainerError: the trainer cannot be used.
        IdentityConflictError: the run was begun with other problems, weights or settings.
        StoreError: the store refuses, or a record cannot be read.
        ValueError: the learning rate has no course over so many steps.
    """
    problems = await read_declared(spec.cycle.problems, store)
    spec.schedule.at(1, spec.windows.step_limit(len(problems)))
    records = await read_steps(store, spec.cycle.run_id)
    run = kind(spec, store, problems, records, calls)
    run.lost = await read_removed(store, spec.cycle.run_id)
    run.trainer = await run.ask(load_trainer, spec.trainer)
    if spec.keep_states is not None and as_remover(run.trainer) is None:
        reason = "has no remove_state (docs/training.md), which keep_states needs: leave that out"
        raise TrainerError(spec.trainer.name, reason)
    if as_replayer(run.trainer) and not spec.cycle.sampling.include_routing_matrix:
        reason = "replays routes, and the cycle asks for none: set sampling.include_routing_matrix"
        raise TrainerError(spec.trainer.name, reason)
    run.trainer_facts = await run.ask(run.trainer.describe)
    if spec.loss.needs_reference:
        run.reference = await run.ask(load_trainer, spec.reference or spec.trainer)
        run.reference_facts = await run.ask(run.reference.describe)
    if records:
        check_same_run(spec.cycle.run_id, records[-1].facts, run.facts)
    if spec.without_effect:
        get_run_logger().warning(spec.without_effect)
    if not spec.dcp_save_interval:
        get_run_logger().warning(
            "dcp_save_interval is 0: no state is saved, and a run that is started again makes "
            "every step again from its groups"
        )
    return run
