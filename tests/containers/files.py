"""Reads a Dockerfile and a compose file as Docker does, what of both ours use."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deployments/Dockerfile"
COMPOSE = ROOT / "deployments/compose.yaml"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@dataclass(frozen=True)
class Service:
    """One service of a compose file, with the shell's variables filled in."""

    name: str
    image: str
    words: list[str]
    environment: dict[str, str]
    volumes: list[tuple[str, str, bool]]  # what is mounted, where, and whether to read only
    tmpfs: list[str]
    is_read_only: bool
    health: str | None


def steps(dockerfile: Path = DOCKERFILE) -> list[tuple[str, str]]:
    """List the instructions with what follows each."""
    text = re.sub(r"(?m)^#.*\n", "", dockerfile.read_text(encoding="utf-8")).replace("\\\n", "")
    return [(word, rest) for word, _, rest in (one.partition(" ") for one in text.splitlines())]


def services(shell: Mapping[str, str] = os.environ) -> dict[str, Service]:
    """Read the compose file; `shell` has the variables of who starts it."""
    text = COMPOSE.read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return {name: _service(name, one, shell) for name, one in found.items()}


def _service(name: str, one: dict[str, Any], shell: Mapping[str, str]) -> Service:
    def filled(given: str) -> str:
        return VARIABLE.sub(lambda each: shell.get(each[1]) or each[2], given)

    given = {
        key: shell.get(key) if value is None else filled(value)
        for key, value in one.get("environment", {}).items()
    }
    mounts = [filled(each).split(":") for each in one.get("volumes", [])]
    return Service(
        name,
        filled(one["image"]),
        shlex.split(filled(one["command"])),
        {key: value for key, value in given.items() if value is not None},
        [(source, target, mode == ["ro"]) for source, target, *mode in mounts],
        one.get("tmpfs", []),
        one.get("read_only", False),
        one.get("healthcheck", {}).get("test"),
    )
