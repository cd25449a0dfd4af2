"""The fleet: the service, its replicas, what they load and serve."""

__all__ = [
    "adapters",
    "faulty",
    "prompt_cache",
    "replica",
    "service",
]
