"""What every test may ask for; the servers live in a plugin of their own."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.servers"]

# Generating text is slow in a first run on a busy machine, and no test is about that.
settings.register_profile("hotload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hotload")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes that are no text by their length: what is compressed differs from second to
    second, and two workers must collect the same tests."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and not val.isascii() else None


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base model, then five steps after it: about 3 MB each, read only."""
    from examples.tiny_trainer import TinyTrainer

    trainer, directory = TinyTrainer(), tmp_path_factory.mktemp("checkpoints")
    paths = [directory / f"{version:06d}" for version in range(6)]
    for path in paths:
        trainer.save(path)
        trainer.step()
    return paths
