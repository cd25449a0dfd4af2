"""The conformance kit: python -m tests.conformance ADAPTER… [--large] [pytest options]

docs/conformance.md tells how an encoder or receiver of your own is plugged in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.conformance.adapters import HERE, ON_TRIAL

ENDINGS = (".py", ".toml")


def main(arguments: list[str]) -> int:
    ON_TRIAL[:] = [Path(text) for text in arguments if text.endswith(ENDINGS)]
    if not ON_TRIAL:
        print(__doc__)
        return 2
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the kit needs none of this environment's
    options = [text for text in arguments if not text.endswith(ENDINGS)]
    where = HERE
    if "--large" in options:
        options.remove("--large")
        where = HERE / "large.py"
    return pytest.main(["-c", str(HERE / "kit.ini"), str(where), *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
