"""The command line, `python -m hotload`: arguments, commands, what is printed and how."""

__all__ = [
    "arguments",
    "checkpoints",
    "contents",
    "deltas",
    "outcome",
    "progress",
    "refusals",
    "report",
    "wording",
]
