"""SkyRL's Tinker server on JAX. By itself it starts its engine through uv, from a clone of SkyRL;
here the engine is started by this interpreter.

    python -m tests.tinker.serve BASE_MODEL DIRECTORY PORT
"""

import sys
from pathlib import Path
from typing import Any

import uvicorn
from skyrl.tinker import api
from skyrl.tinker.config import EngineConfig, config_to_argv


def engine_command(parent: list[str], config: Any) -> list[str]:
    return [sys.executable, "-m", "skyrl.tinker.engine", *config_to_argv(config)]


def main() -> None:
    base_model, directory, port = sys.argv[1:]
    api._build_uv_run_cmd_engine = engine_command
    api.app.state.engine_config = EngineConfig(
        base_model=base_model,
        backend="jax",
        # One row at a time has one shape, which is compiled once.
        backend_config={"max_lora_adapters": 32, "max_lora_rank": 8, "train_micro_batch_size": 1},
        checkpoints_base=directory,
        database_url=f"sqlite:///{Path(directory) / 'tinker.db'}",
    )
    uvicorn.run(api.app, host="127.0.0.1", port=int(port))


if __name__ == "__main__":
    main()
