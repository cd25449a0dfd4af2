"""Cycles killed with SIGKILL at random moments and at chosen ones, and started again (rule 9).

Ten kills by default; `HOTLOAD_KILLS=100` for a longer run, `HOTLOAD_KILL_SEED` for other moments.
"""

import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from examples.tiny_trainer import TinyTrainer
from hotload.parts import RolloutManifest
from hotload.report import CycleReport
from hotload.snapshot import SnapshotKind, SnapshotManifest
from hotload.spec import CycleSpec
from tests.flows.fleet import Fleet, running_fleet, save_blocks
from tests.flows.killed_cycle import CycleProcess, Standing
from tests.flows.store_reader import StoreReader

KILLS = int(os.environ.get("HOTLOAD_KILLS", "10"))
SEED = int(os.environ.get("HOTLOAD_KILL_SEED", "7"))
FULL_AGAIN_AT = 6  # a version that is published whole, so that kills strike later fulls as well

pytestmark = pytest.mark.usefixtures("prefect_api")


class Series:
    """Policy versions one after another, each cycle a process of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.version = 0
        self.spec = self._next()
        self.running: list[CycleProcess] = []

    def start(self) -> CycleProcess:
        """Start the cycle of this version, for the first time or again."""
        self.running.append(CycleProcess(self.fleet, self.spec))
        return self.running[-1]

    def _next(self) -> CycleSpec: ...
