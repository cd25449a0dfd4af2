"""Talks to the network: the checkpoint store, the hot-load service, and the hand-off to trainers.

The only rooms of the library that open connections. They know nothing of the engine, and nothing
else of the library imports them.
"""

__all__ = ["access", "handoff", "inference", "metrics", "redaction", "service", "store"]
