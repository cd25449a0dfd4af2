"""May we publish, what, and who: the chain, the lease, readiness, and the service's wire format."""

__all__ = [
    "chain",
    "check_line",
    "fireworks_api",
    "fireworks_names",
    "lease",
    "preflight",
    "publication",
    "readiness",
    "snapshot",
    "workspace",
]
