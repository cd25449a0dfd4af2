"""Programs that a test starts and looks at while they run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m …`, in a process group of its own, with stderr to be read; it ends with the test.

    If the test fails first, what the program had said stands under the failure, and below that
    where each of its threads was.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    except BaseException as failure:  # pytest.fail raises no Exception
        process.send_signal(signal.SIGABRT)
        _, told = process.communicate()
        failure.add_note(f"python -m {' '.join(arguments)} had said:\n{told}")
        raise
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
