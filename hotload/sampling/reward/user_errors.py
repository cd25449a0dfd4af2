"""Details: what a user's own code said, as it may be stored and shown."""

import re
from collections.abc import Mapping, Sequence

from hotload.clients.redaction import redact

DETAIL_LIMIT_CHARACTERS = 200
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_CHARACTERS = 8


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """What errors of a user's code are not to repeat."""
    return [
        value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SECRET_CHARACTERS
    ]


def told(error: BaseException, secrets: Sequence[str]) -> str:
    """What an exception of a user's code says, in at most 200 characters, without `secrets`."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - its text is a user's code, too
        text = type(error).__name__
    return redact(text, secrets)[:DETAIL_LIMIT_CHARACTERS]  # cut before, part of one would be left


def whole(text: str) -> str:
    """The text as a file can hold it: a user's own may have half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()
