"""Checkpoints in directories: read wherever they lie, written on disk, as the codec decides."""

__all__ = [
    "arrivals",
    "files",
    "finite",
    "inputs",
    "operations",
    "places",
    "prediction",
    "relayout",
    "remote",
    "shards",
]
