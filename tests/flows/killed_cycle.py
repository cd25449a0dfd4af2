"""Flows as processes that are killed: `python -m flows…`, and what stood when one died."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from prefect.results import ResultRecord

from hotload.directory.files import sha256_file
from hotload.publish.snapshot import ShardBatch
from hotload.publish.workspace import Workspace
from hotload.spec import CycleSpec
from tests.flows.fleet import NAMES, Fleet
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.001
BEGUN = re.compile(r"Flow run '[^']+' - Beginning flow run '[^']+' for flow '[^']+'")
ENDED = re.compile(r"Flow run '[^']+' - Finished in state")  # the last one is the cycle's own
FINISHED = re.compile(r"Task run '([^']+)' - Finished in state (\w+)")


class FlowProcess:
    """One run of a flow's command in a process group of its own, and its log so far."""

    def __init__(self, module: str, file: Path, document: Any, **environment: str) -> None:
        file.write_text(yaml.safe_dump(document))
        environment = {
            **os.environ,
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_LOGGING_COLORS": "false",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(file)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.log: list[str] = []
        self._begun = threading.Event()
        self._ended_at = math.inf
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        assert self._begun.wait(PATIENCE_SECONDS), "the flow did not begin"
        self._begun_at = time.monotonic()

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself before `seconds` have passed; waits as long."""
        try:
            self._process.wait(max(0.0, self._begun_at + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exit_code(self) -> int | None:
        """What it ended with, once it has ended and its log is complete."""
        self._reading.join()
        return self._process.returncode

    def reaches(self, moment: Callable[[Self], bool]) -> bool:
        """Whether `moment` comes before it ends by itself; returns as soon as it has come."""
        while not moment(self):
            if self.ends_within(time.monotonic() - self._begun_at + LOOK_SECONDS):
                return False
        return True

    def has_said(self, words: str) -> bool:
        """Whether a line of the log has these words."""
        return any(words in line for line in self.log)

    def finish(self) -> float:
        """Seconds the flow took, once it has ended well; else AssertionError with its log."""
        assert self.ends_within(PATIENCE_SECONDS), self._told()
        self._reading.join()
        assert self._process.returncode == 0, self._told()
        return self._ended_at - self._begun_at

    def kill(self) -> str:
        """SIGKILL the flow's process and nothing else; the last step it had finished.

        What it had started must end by itself: returns only then.
        """
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        # The pipe closes when the last process of the group ends.
        self._reading.join(PATIENCE_SECONDS)
        assert not self._reading.is_alive(), "a child of the killed cycle lives on"
        return self.last_step()

    def last_step(self) -> str:
        """The step that was logged last as finished, in words."""
        found = [match for line in self.log if (match := FINISHED.search(line))]
        return f"after {found[-1][1]}" if found else "before the first step ended"

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def stop(self) -> None:
        """End whatever is left of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if BEGUN.search(line):
                    self._begun.set()
                elif ENDED.search(line):
                    self._ended_at = time.monotonic()
        self._begun.set()

    def _told(self) -> str:
        return f"exit {self._process.returncode}\n" + "\n".join(self.log[-40:])


class CycleProcess(FlowProcess):
    """One run of `python -m flows`."""

    def __init__(
        self,
        fleet: Fleet,
        spec: CycleSpec,
        blocks: dict[str, Any] | None = None,
        **environment: str,
    ) -> None:
        document = {"blocks": blocks or {}, "cycle": spec.model_dump(mode="json")}
        super().__init__("flows", fleet.root / f"{spec.name}.yaml", document, **environment)


@dataclass(frozen=True)
class Standing:
    """Files whose steps had a result when a cycle died: each must be the same file ever after."""

    files: dict[Path, tuple[int, int, str]]
    damaged: tuple[Path, ...]

    @classmethod
    def of(cls, fleet: Fleet, spec: CycleSpec) -> Standing:
        """Every readable result, the deltas and stored shards such a result names, every part."""
        workspace = Workspace(Path(spec.work_dir), NAMES["account_id"], NAMES["deployment_id"])
        deltas = workspace.deltas
        stored = [path for path in fleet.bucket.glob("*/*") if not is_record(path)]
        kept: list[Path] = list(fleet.bucket.glob("_hotload/rollouts/*/part-*.parquet"))
        damaged: list[Path] = []
        for path in sorted(workspace.results.glob("*")):
            result = read_result(path)
            if isinstance(result, ShardBatch):
                encoded = deltas.glob(f"{spec.name}-*/*")
                is_upload = result.upload_seconds > 0
                kept += [path, *_named(result, stored if is_upload else encoded)]
            else:
                damaged.append(path)
        return cls({path: facts(path) for path in kept}, tuple(damaged))

    def changed(self, served: str) -> list[Path]:
        """What was written again since, or is gone although it should not be.

        Once every replica serves `served`, its deltas stay; those of a plan that was given up and
        the results themselves are removed.
        """
        return [
            path
            for path, was in self.files.items()
            if (facts(path) != was if path.exists() else not _may_go(path, served))
        ]


def _may_go(path: Path, served: str) -> bool:
    given_up = path.parents[1].name == "deltas" and path.parent.name != served
    return given_up or path.parent.name == "results"


def read_result(path: Path) -> Any:
    """The value a finished step left, or None where a kill left less."""
    try:
        return ResultRecord.deserialize(path.read_bytes()).result
    except Exception:  # noqa: BLE001 - whatever a half-written file raises
        return None


def is_record(path: Path) -> bool:
    """Whether a path in the bucket is one of our own records."""
    return path.parent.name.startswith("_")


def facts(path: Path) -> tuple[int, int, str]:
    """What changes when a file is written again, even with the same bytes."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, sha256_file(path)


def _named(result: ShardBatch, among: Iterable[Path]) -> list[Path]:
    digests = {(shard.file, shard.sha256) for shard in result.shards}
    return [path for path in among if (path.name, sha256_file(path)) in digests]
