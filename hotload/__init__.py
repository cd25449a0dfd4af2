"""hotload: values, decisions and bytes of a hot-load cycle, without any I/O."""

__all__ = [
    "checkpoint",
    "cli",
    "clients",
    "dataset",
    "delta",
    "directory",
    "errors",
    "http_status",
    "identity",
    "options",
    "publish",
    "quantities",
    "records",
    "report",
    "reward",
    "rollout",
    "sampling",
    "spec",
]
