"""Sampling decisions: trajectories, groups, the window, failures, and the inference wire format."""

__all__ = [
    "admission",
    "breaker",
    "completions_api",
    "counts",
    "engines",
    "failures",
    "group_rules",
    "merge_turns",
    "problem_rows",
    "request",
    "retry_after",
    "routing",
    "straddling",
    "trajectory",
    "window",
]
