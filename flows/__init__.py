"""The order of the steps; read flows/cycle.py first. Beside them what starts them: the command
lines, the cycle file, `serve`."""

__all__ = [
    "adopt",
    "command_line",
    "cycle",
    "cycle_file",
    "plan",
    "publish",
    "retain",
    "rollback",
    "sampling",
    "serve",
]
