"""Programs that a test starts and looks at while they run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m …`, in a process group of its own, with stderr to be read; it ends with the test.

    If the test fails first, what the program had said stands under the failure.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    except BaseException as failure:  # pytest.fail raises no Exception
        process.kill()
        _, told = process.communicate()
        failure.add_note(f"python -m {' '.join(arguments)} had said:\n{told}")
        raise
    finally:
        process.kill()
        process.communicate()
