"""Trainers: what one is, what is done over every one of them, and those that come with the library.

Nothing here schedules a GPU or knows a cycle: whoever has a loop of their own needs none of it.
"""

__all__ = [
    "base_digest",
    "declaration",
    "loading",
    "refused_fields",
    "router_replay",
    "saved_state",
    "scale_probe",
    "step_samples",
    "tinker_trainer",
    "torch_trainer",
    "trainer",
    "training_step",
    "turn_scores",
    "vendor_config",
]
