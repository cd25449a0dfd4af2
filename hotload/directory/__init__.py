"""Checkpoints on disk: the only rooms of the library that open files."""
