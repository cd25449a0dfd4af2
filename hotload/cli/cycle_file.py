"""Reads a cycle file as far as it is a mapping; who declares what in it is checked by its user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hotload.declared_file import read_yaml
from hotload.errors import did_you_mean

BLOCK_FIELDS = ("account", "service", "store", "checkpoint_store", "rollouts")


def read_cycle_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read `cycle:` and `blocks:` of a file; the second is empty where nothing is inline.

    Raises:
        ValueError: the file is not a cycle file; says what is wrong, without a value.
        OSError: the file cannot be read.
    """
    cycle, inline = _read_sections(path, "cycle")
    return cycle, inline


def read_run_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read `cycle:`, `training:` and `blocks:` of a file that declares a training run.

    Raises:
        ValueError, OSError: as `read_cycle_file`.
    """
    cycle, training, inline = _read_sections(path, "cycle", "training")
    return cycle, training, inline


def _read_sections(path: Path, *sections: str) -> list[dict[str, Any]]:
    """Read the sections, each a mapping that must be there, and then `blocks:`."""
    data = read_yaml(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(one), dict) for one in sections):
        named = f"{path} is empty" if data is None else f"{path}"
        expected = " and ".join(f"`{one}:`" for one in sections)
        raise ValueError(f"{named}: expected a mapping with {expected} and, if needed, `blocks:`")
    inline = data.get("blocks") or {}
    if not isinstance(inline, dict):
        raise ValueError(f"{path}: expected a mapping below `blocks:`")
    unknown = (data.keys() - {*sections, "blocks"}) | (inline.keys() - set(BLOCK_FIELDS))
    if "training" in unknown:
        raise ValueError(f"{path} declares a training run: python -m flows.rl_loop {path}")
    if unknown:
        known = ", ".join(BLOCK_FIELDS)
        found = sorted(map(str, unknown))
        hint = did_you_mean(found[0], (*sections, "blocks", *BLOCK_FIELDS))
        expected = ", ".join(sections)
        raise ValueError(f"{path}: unknown {found}{hint}; expected {expected}, and blocks {known}")
    return [*(data[one] for one in sections), inline]
