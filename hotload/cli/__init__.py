"""The command line, `python -m hotload`: arguments, commands, what is printed and how."""

__all__ = [
    "arguments",
    "checkpoints",
    "contents",
    "cost_table",
    "cycle_file",
    "deltas",
    "doors",
    "outcome",
    "progress",
    "refusals",
    "report",
    "retention_table",
    "service",
    "store",
    "wording",
]
