"""Talks to the network: stores, the hot-load service, inference, the trigger, the hand-off
and the ranks of trainers.

The only rooms of the library that open connections; only a remote reward has its own. They know
nothing of the engine.
"""

__all__ = [
    "access",
    "arrivals",
    "handoff",
    "inference",
    "metrics",
    "nodes",
    "publish",
    "redaction",
    "remote_checkpoint",
    "service",
    "store",
    "trigger",
]
