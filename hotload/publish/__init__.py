"""May we publish, what, who, and at what cost: the chain, the lease, readiness, what a store keeps,
and the service's wire format."""

__all__ = [
    "chain",
    "cost",
    "doors",
    "explain",
    "fireworks_api",
    "fireworks_names",
    "lease",
    "lines",
    "preflight",
    "probe",
    "publication",
    "readiness",
    "retention",
    "snapshot",
    "workspace",
]
