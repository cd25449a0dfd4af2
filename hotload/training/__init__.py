"""What a step of training rests on, whoever the trainer is: losses, corrections, advantages by
turn, schedules, windows, and what a step leaves behind so that a run goes on after a kill."""

__all__ = [
    "correction",
    "custom_loss",
    "divisor",
    "kept_states",
    "kl",
    "loss_inputs",
    "losses",
    "policy_loss",
    "resume",
    "schedule",
    "settings",
    "step_record",
    "turn_advantages",
    "windows",
]
