"""The inference endpoints: one request, its attempts, and the window they share."""

__all__ = [
    "attempt",
    "client",
    "conversation",
    "proof",
    "request_slots",
    "sampler",
    "transport",
    "waiters",
]
