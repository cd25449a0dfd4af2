"""One arrow of a training step a task: train, save, export, record, retain states, acknowledge; and
how a run that was killed comes back to where it stood."""

__all__ = ["ahead", "restore", "retain_states", "run", "show_training", "step"]
