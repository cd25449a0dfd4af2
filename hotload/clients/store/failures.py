"""Whatever a store's client library raises, as one of our two errors: try again, or stop.

botocore, aiohttp, gcsfs, google.auth, requests and the operating system spell the same facts
differently. What a network can cause may pass; else the HTTP status decides, where there is one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

from hotload.clients.redaction import redact
from hotload.errors import StoreError, StoreUnavailableError
from hotload.http_status import MAY_PASS, meaning_of

ASK_AGAIN_SECONDS = (2.0, 4.0, 8.0)
LONG_AGAIN_SECONDS = (2.0, 4.0, 8.0, 16.0, *[30.0] * 9)
"""As long as a task repeats, for what waits beside tasks that do."""
RETRYABLE_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"})
RETRYABLE_ERRNO = frozenset(
    {
        *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET),
        *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET),
    }
)
# Class names, so that no client library is imported for a store that does not use it, as
# `Name@package` where the name means something else elsewhere. Derived classes count as named.
TRANSPORT_ERRORS = frozenset(
    {
        "ConnectionError@botocore",  # no connection: refused, reset, name look-up, TLS, proxy
        "HTTPClientError",  # botocore: every failure below HTTP
        "ResponseParserError",  # botocore: an answer that is no S3 answer
        "IncompleteReadError",  # botocore: a body cut short
        "CapacityNotAvailableError",  # botocore: it holds back after such failures
        "ChecksumError",  # gcsfs, botocore: what arrived is not what was sent
        "FlexibleChecksumError",  # botocore, the same
        "MetadataRetrievalError",  # botocore: the machine's own service of credentials
        "ClientError@aiohttp",
        "HttpProcessingError",  # aiohttp: an answer that is not HTTP
        "IncompleteRead",  # urllib3, http.client
        "RequestException",  # requests, which gcsfs raises for a 502
        *("TransportError@httpx", "TransportError@httpx2"),  # huggingface_hub, behind hf://
        "TransportError@google",
        "TimeoutError@google",
        "ResponseError@google",
    }
)
# Derived from those, or the cause of one, and no waiting mends them.
ADDRESS_ERRORS = frozenset(
    {
        *("InvalidURL", "InvalidSchema", "MissingSchema", "URLRequired", "InvalidHeader@requests"),
        *("UnsupportedProtocol@httpx", "UnsupportedProtocol@httpx2"),
        *("NonHttpUrlClientError", "RedirectClientError", "TooManyRedirects"),
        *("StreamConsumedError", "UnrewindableBodyError"),  # requests: a mistake of its caller
        "HTTPError@requests",  # its status decides
    }
)
CERTIFICATE_ERRORS = frozenset(
    {
        "SSLCertVerificationError",
        "ClientConnectorCertificateError",
        "ServerFingerprintMismatch",
    }
)
CREDENTIAL_ERRORS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "MetadataRetrievalError",
        "TokenRetrievalError",
        "NoAuthTokenError",
        "SSOError",
        "LoginError",
        "ProfileNotFound",
        "GoogleAuthError",
    }
)
MISSING_BUCKET = "NoSuchBucket"
NO_BUCKET = "the bucket does not exist; hotload never creates one"
TEXT_CHARS = 300
# What the configuration here is to say otherwise, by the store's own code.
REMEDIES = {
    "ExpiredToken": "renew the credentials",
    "ExpiredTokenException": "renew the credentials",
    "TokenRefreshRequired": "renew the credentials",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "InvalidAccessKeyId": "compare the key id with the account's",
    "SignatureDoesNotMatch": "compare the secret key with the account's",
}
# Codes, or statuses of answers to HEAD, which have no body.
ELSEWHERE = frozenset(
    {
        *("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307"),
        *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "400"),
    }
)
REGION = re.compile(r"[a-z]{2}[a-z0-9-]{1,30}")

T = TypeVar("T")

logger = logging.getLogger(__name__)


async def asked_again(
    what: str, step: Callable[[], Awaitable[T]], delays: Iterable[float] = ASK_AGAIN_SECONDS
) -> T:
    """Run a step again where the store does not answer, for one that no engine repeats.

    Args:
        what: is asked for, in words.
        delays: seconds before each further try; a quarter of a minute in all if left out.

    Raises:
        StoreUnavailableError: not so after the last of them.
    """
    for delay in delays:
        try:
            return await step()
        except StoreUnavailableError as error:
            logger.warning("%s is asked for again in %.0f s: %s", what, delay, error)
            await asyncio.sleep(delay)
    return await step()


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
        if isinstance(status := getattr(response, "status_code", None), int):  # requests
            return status, ""
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
    is_wrong_address = _named(error, ADDRESS_ERRORS) is not None
    if _named(error, CERTIFICATE_ERRORS) or (status is None and is_wrong_address):
        return False
    # Before the status: gcsfs makes a 401 of a token that could not be refreshed, whatever why.
    if _named(error, TRANSPORT_ERRORS) and not is_wrong_address:
        return True
    if any(getattr(link, "retryable", False) is True for link in _chain(error)):  # google.auth
        return True
    if status is not None:
        may_pass = status == 409 or meaning_of(status) in MAY_PASS
        return may_pass or code in RETRYABLE_CODES
    if isinstance(
        error, TimeoutError | ConnectionError | EOFError | socket.gaierror | ssl.SSLError
    ):
        return True
    return isinstance(error, OSError) and error.errno in RETRYABLE_ERRNO


def _reason(error: BaseException, status: int | None, code: str) -> str:
    if code == MISSING_BUCKET:
        return NO_BUCKET
    if name := _named(error, CERTIFICATE_ERRORS):
        return f"the store's certificate is not trusted ({name})"
    if name := _named(error, CREDENTIAL_ERRORS):
        return f"no usable credentials ({name})"
    if status is not None:
        told = f"the store answered HTTP {status} {code or _head(error)}".rstrip()
        if region := _named_region(error):
            return f"{told}; the bucket is in {region}: say so in AWS_DEFAULT_REGION, or as" + (
                f" client_kwargs: {{region_name: {region}}} in the store's options"
            )
        return f"{told}; {REMEDIES[code]}" if code in REMEDIES else told
    if name := _named(error, ADDRESS_ERRORS):
        return f"the store's address cannot be used ({name})"
    if name := _named(error, TRANSPORT_ERRORS):
        return f"no connection to the store ({name})"
    if isinstance(error, TimeoutError):
        return "the store did not answer in time"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)[:TEXT_CHARS]
    return f"{type(error).__name__}: {_head(error)}"


def _named_region(error: BaseException) -> str | None:
    """The region that an S3 answer says the bucket is in, where it refuses for that."""
    for link in _chain(error):
        if isinstance(response := getattr(link, "response", None), dict):
            refused, answered = response.get("Error", {}), response.get("ResponseMetadata", {})
            is_elsewhere = refused.get("Code") in ELSEWHERE
            headers = answered.get("HTTPHeaders", {})
            region = str(refused.get("Region") or headers.get("x-amz-bucket-region"))
            return region if is_elsewhere and REGION.fullmatch(region) else None
    return None


def _head(error: BaseException) -> str:
    return " ".join(str(error).split())[:TEXT_CHARS]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _named(error: BaseException, names: frozenset[str]) -> str | None:
    """Name of the class of `error`, or of what lies behind it, that is or derives from `names`."""
    for link in _chain(error):
        for cls in type(link).__mro__:
            if names & {cls.__name__, f"{cls.__name__}@{cls.__module__.partition('.')[0]}"}:
                return type(link).__name__
    return None
