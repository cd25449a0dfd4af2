"""Takes secrets out of a text before it is shown."""

from __future__ import annotations

from collections.abc import Iterable

MASK = "********"
SHORTEST = 4  # masking shorter values would blank ordinary words


def redact(text: str, secrets: Iterable[str]) -> str:
    """Mask in `text` every secret of four or more characters, longest first."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, MASK)
    return text


def leaves(value: object) -> Iterable[str]:
    """List every string inside nested mappings and sequences, bytes read as Latin-1."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from leaves(item)
