"""The order of the steps; read flows/cycle.py first. Beside them what starts them: the command
lines, the cycle file, `serve`."""

__all__ = [
    "adopt",
    "async_rl_loop",
    "carry",
    "command_line",
    "cycle",
    "cycle_file",
    "plan",
    "publish",
    "retain",
    "rl_loop",
    "rollback",
    "sampling",
    "serve",
    "watch",
]
