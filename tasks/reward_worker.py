"""The child process in which a user's reward runs: `python -m tasks.reward_worker`.

It speaks frames over its first pipes: four bytes of length, then a pickle from us or JSON from it.
The reward's own prints go to standard error. It ends when its parent does, also in the middle of a
reward that hangs.
"""

import json
import os
import pickle
import struct
import threading
from queue import SimpleQueue
from typing import Any, BinaryIO

from hotload.errors import RewardError
from hotload.rewards import as_number, check_arguments, load_reward

LENGTH = struct.Struct(">I")
DETAIL_LIMIT_CHARACTERS = 200


def _read_frames(source: BinaryIO, calls: SimpleQueue[Any]) -> None:
    while head := source.read(LENGTH.size):
        calls.put(pickle.loads(source.read(*LENGTH.unpack(head))))
    os._exit(0)  # the parent is gone; a reward that hangs must not outlive it


def _reply(sink: BinaryIO, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    sink.write(LENGTH.pack(len(data)) + data)
    sink.flush()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:DETAIL_LIMIT_CHARACTERS]


def main() -> None:
    """Load the reward named first, say so, then answer one call after the other."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    calls: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_frames, args=(source, calls), daemon=True).start()
    name, arguments = calls.get()
    try:
        reward = load_reward(name)
        check_arguments(name, reward, arguments)
    except RewardError as error:
        _reply(sink, {"refused": error.reason})
        return
    _reply(sink, {"ready": True})
    while True:
        problem, trajectory = calls.get()
        try:
            value = reward(problem, trajectory, **arguments)
            number = as_number(value)
        except BaseException as error:  # noqa: BLE001 - also a reward that calls sys.exit
            _reply(sink, {"raised": _told(error)})
            continue
        if number is None:
            _reply(sink, {"not_a_number": type(value).__name__ + " " + repr(value)[:80]})
        else:
            _reply(sink, {"reward": number})


if __name__ == "__main__":
    main()
