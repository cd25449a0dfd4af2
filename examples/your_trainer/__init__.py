"""Trainers of your own: `save_every_step.py` knows nothing of hotload, docs/first-run.md puts it on
the cycle; `learn_from_rollouts.py` also learns from what comes back.
"""
