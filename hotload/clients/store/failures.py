"""Whatever a store's client library raises, as one of our two errors: try again, or stop.

s3fs, gcsfs and the operating system spell the same facts differently; the HTTP status, where there
is one, decides.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator

from hotload.clients.redaction import redact
from hotload.errors import StoreError, StoreUnavailableError
from hotload.http_status import MAY_PASS, meaning_of

RETRYABLE_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"})
RETRYABLE_ERRNO = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET}
)
# Class names, so that no client library is imported for a store that does not use it.
TRANSPORT_ERRORS = frozenset(
    {
        "HTTPClientError",  # botocore: every failure below HTTP
        "ResponseParserError",  # botocore: an answer that is no S3 answer
        "IncompleteReadError",  # botocore: a body cut short
        "ClientError@aiohttp",
        "ChecksumError",  # gcsfs: what arrived is not what was sent
        "RequestException",  # requests, which gcsfs raises for a 502
        "TransportError@google",
    }
)
CREDENTIAL_ERRORS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "TokenRetrievalError",
        "GoogleAuthError",
    }
)
MISSING_BUCKET = "NoSuchBucket"
NO_BUCKET = "the bucket does not exist; hotload never creates one"
TEXT_CHARS = 300


def store_error(error: BaseException, path: str, secrets: Iterable[str] = ()) -> StoreError:
    """Say what `error` means for an operation on `path`; its text is short and without `secrets`.

    408, 409, 425, 429, 5xx, timeouts and broken connections may pass; all else is final.
    """
    if isinstance(error, StoreError):
        return error
    status, code = answer(error)
    reason = redact(_reason(error, status, code), secrets)
    return (StoreUnavailableError if _may_pass(error, status, code) else StoreError)(path, reason)


def answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and the store's own code behind an exception; `(None, "")` without an answer.

    s3fs translates a 412 to a bare `OSError(22)` and keeps the answer in `__cause__`.
    """
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if not isinstance(status, int) and code.isdigit():
                status = int(code)
            return status, code if re.fullmatch(r"[A-Za-z][A-Za-z.]{0,63}", code) else ""
        if type(link).__name__ == "HttpError":  # gcsfs.retry
            number = str(getattr(link, "code", None))
            return int(number) if number.isdigit() else None, ""
    return None, ""


def is_precondition_failure(error: BaseException) -> bool:
    """Tell whether the store refused a create because the object exists."""
    return isinstance(error, FileExistsError) or answer(error)[0] == 412


def is_missing(error: BaseException) -> bool:
    """Tell whether the store says that an object, or its bucket, does not exist."""
    return isinstance(error, FileNotFoundError) or answer(error)[0] == 404


def _may_pass(error: BaseException, status: int | None, code: str) -> bool:
    if status is not None:
        may_pass = status == 409 or meaning_of(status) in MAY_PASS
        return may_pass or code in RETRYABLE_CODES
    names = set(_names(error))
    if names & CREDENTIAL_ERRORS and not names & TRANSPORT_ERRORS:
        return False
    if names & TRANSPORT_ERRORS or isinstance(error, TimeoutError | ConnectionError | EOFError):
        return True
    return isinstance(error, OSError) and error.errno in RETRYABLE_ERRNO


def _reason(error: BaseException, status: int | None, code: str) -> str:
    names = set(_names(error))
    if code == MISSING_BUCKET:
        return NO_BUCKET
    if status is not None:
        return f"the store answered HTTP {status} {code or _head(error)}".rstrip()
    if names & TRANSPORT_ERRORS:
        return f"no connection to the store ({type(error).__name__})"
    if names & CREDENTIAL_ERRORS:
        return f"no usable credentials ({type(error).__name__})"
    if isinstance(error, TimeoutError):
        return "the store did not answer in time"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)[:TEXT_CHARS]
    return f"{type(error).__name__}: {_head(error)}"


def _head(error: BaseException) -> str:
    return " ".join(str(error).split())[:TEXT_CHARS]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _names(error: BaseException) -> Iterator[str]:
    """Names of the classes of `error`, plain and as `Name@package`."""
    for cls in type(error).__mro__:
        yield cls.__name__
        yield f"{cls.__name__}@{cls.__module__.partition('.')[0]}"
