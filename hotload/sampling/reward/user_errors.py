"""Make what a user's own code says fit to be stored and shown: short, and without secrets."""

import re
from collections.abc import Mapping, Sequence

from hotload.clients.redaction import redact

DETAIL_LIMIT_CHARACTERS = 200
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_CHARACTERS = 8


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables named like a key, which no error may repeat."""
    return [
        value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SECRET_CHARACTERS
    ]


def describe_exception(error: BaseException, secrets: Sequence[str]) -> str:
    """Describe an exception of a user's code in at most 200 characters, without `secrets`."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - its text is a user's code, too
        text = type(error).__name__
    return redact(text, secrets)[:DETAIL_LIMIT_CHARACTERS]  # cut before, part of one would be left


def replace_surrogates(text: str) -> str:
    """Make a text that a file can hold: a user's own may have half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()
