"""Where the CPU of a sample goes."""

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any


def print_costs(work: Callable[[], Any], samples: int, lines: int) -> None:
    """Run `work`, which makes `samples`; print the largest costs of this thread, by their own time.

    What waits for the network is left out of the whole.
    """
    profiler = cProfile.Profile()
    profiler.runcall(work)
    costs: dict[tuple[str, int, str], tuple[float, int]] = {
        place: (own, calls)
        for place, (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        if "select.epoll" not in place[2]
    }
    total = sum(own for own, _ in costs.values())
    print(f"\nCPU of a sample by profiler (its own cost included), {lines} on top:")
    for (path, line, name), (own, calls) in sorted(costs.items(), key=lambda it: -it[1][0])[:lines]:
        where = name if path == "~" else f"{Path(path).name}:{line} {name}"
        print(f"  {own / total:5.1%}  {calls / samples:7.1f} calls per sample  {where}")
