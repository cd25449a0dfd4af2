"""Feeds the readers of headers, indexes and frames with bytes nobody wrote.

    python -m tests.fuzz SECONDS [CORPUS]

With atheris (`make fuzz` brings it) inputs are chosen by what they reach in `hotload`; without it
they are mutations of the corpus at random. New inputs go to CORPUS; an input that fails is written
to a file named after its digest, and the exit status is 1.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

MEMORY_BYTES = 256 << 20  # above what the process has once it is up
INPUT_BYTES = 1 << 16


def main(seconds: int, corpus: Path) -> None:
    if atheris:
        # Of an instrumented comparison of arrays atheris 3 never frees the result.
        of_arrays = ["hotload.delta.encode", "hotload.delta.libzstd"]
        with atheris.instrument_imports(include=["hotload"], exclude=of_arrays):
            from tests.fuzz.seeds import seeds
            from tests.fuzz.targets import any_of
    else:
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import any_of
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    bound_memory()
    if atheris:
        options = [f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES}", "-timeout=10"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], any_of)
        atheris.Fuzz()
        return
    chance, inputs, count = random.Random(0), [path.read_bytes() for path in corpus.iterdir()], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(chance.choice(inputs), chance.choice(inputs), chance)
        count += 1
        try:
            any_of(data)
        except BaseException:
            path = Path(f"crash-{hashlib.sha1(data).hexdigest()}")
            path.write_bytes(data)
            print(f"failed: {path}", file=sys.stderr)
            raise
    print(f"{count} inputs in {seconds} s, without atheris; nothing found")


def bound_memory() -> None:
    """Let an allocation that the input asked for fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """The input with a few bytes changed, cut, doubled, or taken from another one."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randint(0, len(changed))
        size = chance.choice((1, 1, 2, 4, 8, 30))
        change = chance.choice(("flip", "cut", "double", "random", "splice", "ends"))
        if change == "flip" and at < len(changed):
            changed[at] ^= 1 << chance.randint(0, 7)
        elif change == "cut":
            del changed[at : at + size]
        elif change == "double":
            changed[at:at] = changed[at : at + size]
        elif change == "random":
            changed[at : at + size] = chance.randbytes(size)
        elif change == "splice":
            begin = chance.randint(0, len(other))
            changed[at : at + size] = other[begin : begin + size]
        elif change == "ends":
            changed[at : at + size] = chance.choice((b"\0", b"\xff", b"\x7f")) * size
    return bytes(changed[:INPUT_BYTES])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(int(sys.argv[1]), Path(folder))
