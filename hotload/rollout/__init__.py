"""Sampling decisions: trajectories, groups, the window, failures, and the inference wire format."""
