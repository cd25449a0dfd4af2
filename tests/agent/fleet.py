"""Two agents with tiny engines and a door over them, for clients that run in another environment.

`python -m tests.agent.fleet DIRECTORY BASE [DOOR OPTION …]` prints `door: URL ENGINE ENGINE`. The
bucket is DIRECTORY/bucket. It serves until it is killed.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.agent.conftest import Place
from tests.emulator.conftest import Publisher


def main() -> None:
    """Start all of it."""
    directory, base, *options = sys.argv[1:]
    publisher = Publisher(Path(directory))
    publisher.base = Path(base)
    with ExitStack() as stack:
        place = Place(publisher, Path(directory), stack)
        engines = [place.agent(name).engine.url for name in ("left", "right")]
        place.open_door(*options)
        assert place.door is not None
        print("door:", place.door.address, *engines, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
