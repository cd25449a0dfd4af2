"""What every test may ask for; the servers live in a plugin of their own."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.servers"]

# Generating text is slow in a first run on a busy machine, and no test is about that.
settings.register_profile("hotload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hotload")
