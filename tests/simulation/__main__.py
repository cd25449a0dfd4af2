"""`python -m tests.simulation`: many worlds, each from its seed, on every core.

Prints the rate, what became of the cycles, the faults by kind, and the seed of every violation.
`--replay SEED` tells one story again, with its trace.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections import Counter

from tests.simulation.faults import KINDS
from tests.simulation.many import be_quiet, tell_many
from tests.simulation.story import CYCLES, Story, tell, tell_every_kill

KINDS_AT_LEAST = 30


def main() -> int:
    """Run the worlds; 0 when nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first world; 0")
    parser.add_argument("--cycles", type=int, default=10_000, help="that publish only; 10000")
    parser.add_argument("--whole", type=int, default=1_000, help="with rollouts and report; 1000")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="all cores")
    parser.add_argument("--replay", type=int, metavar="SEED", help="tell one story with its trace")
    parser.add_argument("--as-whole", action="store_true", help="replay whole cycles")
    asked = parser.parse_args()
    be_quiet()
    if asked.replay is not None:
        story = tell(asked.replay, is_whole=asked.as_whole)
        print(*story.lines, f"digest {story.digest}", sep="\n")
        return bool(story.violations)
    stories = [tell_every_kill(is_whole=is_whole) for is_whole in (False, True)]
    for story in stories:
        print(f"killed at each of {story.faults['killed']} steps, and started again each time")
    for is_whole, cycles in ((False, asked.cycles), (True, asked.whole)):
        began = time.monotonic()
        seeds = range(asked.seed, asked.seed + -(-cycles // CYCLES))
        told = list(tell_many(seeds, is_whole=is_whole, processes=asked.processes))
        if told:
            _say("whole cycles" if is_whole else "publishing cycles", told, began)
        stories += told
    struck = sum((story.faults for story in stories), Counter[str]())
    print(f"\n{len(struck)} kinds of fault, {struck.total()} struck")
    for name, count in struck.most_common():
        print(f"{count:8} {name}")
    for name in [name for name in KINDS if not struck[name]]:
        print(f"{'never':>8} {name}")
    bad = [story for story in stories if story.violations]
    print(f"\n{sum(len(story.violations) for story in bad)} violations")
    for story in bad:
        again = f"--replay {story.seed}" + (" --as-whole" if story.is_whole else "")
        print(f"seed {story.seed}: {story.violations[0]}")
        print(f"         python -m tests.simulation {again}")
    return bool(bad) or len(struck) < min(KINDS_AT_LEAST, len(stories))


def _say(what: str, stories: list[Story], began: float) -> None:
    seconds = time.monotonic() - began
    cycles = sum(story.cycles for story in stories)
    lives = sum(story.lives for story in stories)
    outcomes = sum((story.outcomes for story in stories), Counter[str]())
    longest = max(story.longest_seconds for story in stories)
    print(f"{cycles} {what} in {len(stories)} worlds, {lives} processes: {seconds:.0f} s, ", end="")
    cpu_seconds = sum(story.cpu_seconds for story in stories)
    print(f"{cycles / seconds:.1f} cycles per second, {cycles / cpu_seconds:.1f} per second of CPU")
    print(f"the longest took {longest:.0f} s of its own time")
    print(f"seeds {stories[0].seed} to {stories[-1].seed}; digest of all traces {_digest(stories)}")
    print(*(f"{count:8} {name}" for name, count in outcomes.most_common()), sep="\n")


def _digest(stories: list[Story]) -> str:

    return hashlib.sha256("".join(story.digest for story in stories).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
