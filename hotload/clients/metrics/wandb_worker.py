"""The process that logs one step at Weights & Biases, as JSON on its standard input says.

`python -m hotload.clients.metrics.wandb_worker`. The client of Weights & Biases may hang without
end; a process can be ended.
"""

import importlib
import json
import sys


def main() -> int:
    """Log one step of the run that has the run id for its own, so that every cycle continues it.

    On an error its name alone is written: what it says may hold a key.
    """
    step = json.load(sys.stdin)
    try:
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True)
        run = wandb.init(**step["run"], resume="allow", settings=settings)
        run.log(step["metrics"], step=step["step"])
        run.finish()
    except Exception as error:  # noqa: BLE001 - its client raises anything
        sys.stdout.write(type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
