"""Talks to the network: the checkpoint store, the hot-load service, and the hand-off to trainers.

The only rooms of the library that open connections. They know nothing of the engine; `sampling` and
the command line's `report` import them.
"""

__all__ = ["access", "handoff", "inference", "metrics", "redaction", "service", "store"]
