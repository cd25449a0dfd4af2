"""What is known of a service: names, signals, ledger, what may be let in."""

__all__ = [
    "addresses",
    "admission",
    "ledger",
    "log",
    "report",
    "service",
    "settings",
    "signals",
    "state",
    "validation",
]
