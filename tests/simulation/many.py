"""Many worlds at once, a process a core; the stories come back in the order of their seeds."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable, Iterator

from tests.simulation.story import Story, tell


def tell_many(seeds: Iterable[int], *, is_whole: bool, processes: int) -> Iterator[Story]:
    """Tell the stories of `seeds`, without their traces."""
    worlds = [(seed, is_whole) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(processes, be_quiet) as pool:
        yield from pool.imap(_tell, worlds)


def be_quiet() -> None:
    """Log nothing: most of what the program warns of was ordered."""
    logging.disable(logging.CRITICAL)


def _tell(world: tuple[int, bool]) -> Story:
    seed, is_whole = world
    story = tell(seed, is_whole=is_whole)
    story.lines.clear()
    return story
