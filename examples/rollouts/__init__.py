"""Rollout functions to start from, each with a reward and a show: `python -m
examples.rollouts.calculator`.
"""
