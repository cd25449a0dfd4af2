"""What a test or a person sets: clock, faults, settings."""
