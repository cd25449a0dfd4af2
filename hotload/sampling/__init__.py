"""The sampling engine: a running rollout, its draws and its groups."""

__all__ = [
    "concurrently",
    "draw",
    "part_files",
    "part_writer",
    "problems",
    "reward",
    "rollout",
    "row_gate",
    "sample_group",
    "watch_versions",
]
