"""The process that logs steps at Weights & Biases, as JSON lines on its standard input say: the run
first, then `{"step": …, "metrics": {…}}` each, until that ends.

`python -m hotload.clients.metrics.wandb_worker`. The client of Weights & Biases may hang without
end; a process can be ended.
"""

import importlib
import json
import sys


def main() -> int:
    """Log steps of the run that has the id for its own, so that whoever comes later continues it.

    On an error its name alone is written: what it says may hold a key.
    """
    lines = map(json.loads, sys.stdin)
    try:
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True)
        run = wandb.init(**next(lines), resume="allow", settings=settings)
        for line in lines:
            run.log(line["metrics"], step=line["step"])
        run.finish()
    except Exception as error:  # noqa: BLE001 - its client raises anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
        name = type(error).__name__
        sys.stdout.write("the package wandb is not installed here" if is_missing else name)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
