"""What a test or a person sets: clock, faults, settings."""

__all__ = ["clock", "faults", "settings"]
