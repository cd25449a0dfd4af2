"""Checkpoints on disk: the only rooms of the library that open files."""

__all__ = ["files", "inputs", "operations", "relayout", "shards"]
