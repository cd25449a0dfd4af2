"""The sampling engine: a running rollout, its draws and its groups."""

__all__ = [
    "draw",
    "earlier_manifest",
    "nodes",
    "part_carrier",
    "part_files",
    "part_writer",
    "problem_files",
    "problems",
    "processes",
    "reward",
    "rollout",
    "row_gate",
    "sample_group",
    "stamp",
    "user_function",
    "watch_versions",
]
