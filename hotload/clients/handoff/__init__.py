"""The hand-off: scored groups for a trainer, with lease and acknowledgement."""
