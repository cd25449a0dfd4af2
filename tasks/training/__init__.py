"""One arrow of a training step a task: train, save, export, record, acknowledge; and how a run that
was killed comes back to where it stood."""

__all__ = ["ahead", "restore", "run", "show_training", "step"]
