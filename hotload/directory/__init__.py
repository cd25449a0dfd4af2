"""Checkpoints in directories: read wherever they lie, written on disk, as the codec decides."""

__all__ = [
    "arrivals",
    "delta_codecs",
    "file_digests",
    "files",
    "finite",
    "inputs",
    "operations",
    "places",
    "prediction",
    "relayout",
    "remote",
    "shards",
    "supplied_digests",
]
