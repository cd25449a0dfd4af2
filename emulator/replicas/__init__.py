"""The fleet: the service, its replicas, what they load and serve."""

__all__ = [
    "adapters",
    "arrival",
    "bucket",
    "ledger",
    "prompt_cache",
    "replica",
    "service",
    "signals",
    "validation",
]
