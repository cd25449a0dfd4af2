"""Reads a YAML file in which a person declares something; what is wrong in it is said without a
value, which may be a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from hotload.errors import did_you_mean

LIMIT_BYTES = 1 << 20


def read_yaml(path: Path) -> Any:
    """Read a file that a person wrote, whatever it holds; no error quotes it.

    Raises:
        ValueError: it is too large, or not YAML; says where.
        OSError: the file cannot be read.
    """
    if path.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"{path} is larger than {LIMIT_BYTES} bytes")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        # The error's own text quotes the line, and that may hold a secret.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else ""
        raise ValueError(f"{path} is not YAML{where}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def field_meant(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """Name the field that a misspelt one is close to, in the part of the model that it is in."""
    for step in place[:-1]:
        model = part_model(model, str(step))
    return did_you_mean(str(place[-1]), model.model_fields)


def part_model(model: type[BaseModel], field: str) -> type[BaseModel]:
    """Find the model that a field of a model has."""
    annotation = model.model_fields[field].annotation
    parts = [annotation, *get_args(annotation)]
    return next(one for one in parts if isinstance(one, type) and issubclass(one, BaseModel))
