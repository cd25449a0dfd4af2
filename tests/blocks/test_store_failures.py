"""Which failures of a store may pass: every class of exception its client libraries have."""

import errno
import inspect
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp.client_exceptions
import aiohttp.http_exceptions
import botocore.exceptions
import botocore.parsers
import gcsfs.retry
import google.auth.exceptions
import httpx
import httpx2
import pytest
import requests.exceptions

from hotload.clients.store import Store
from hotload.clients.store.failures import store_error
from hotload.errors import StoreError, StoreUnavailableError
from tests.blocks.proxy import proxying
from tests.servers import StoreServer

# Of each library: what a network can cause, with all that is derived from it, and what is derived
# from it and yet final. Every other class of the library is final.
TREES: dict[ModuleType, tuple[str, str]] = {
    botocore.exceptions: (
        "ConnectionError HTTPClientError IncompleteReadError ChecksumError FlexibleChecksumError"
        " MetadataRetrievalError CapacityNotAvailableError",
        "",
    ),
    botocore.parsers: ("ResponseParserError", ""),
    aiohttp.client_exceptions: (
        "ClientError",
        "InvalidURL NonHttpUrlClientError RedirectClientError TooManyRedirects"
        " ClientConnectorCertificateError ServerFingerprintMismatch",
    ),
    aiohttp.http_exceptions: ("HttpProcessingError", ""),
    gcsfs.retry: ("ChecksumError", ""),
    httpx: ("TransportError", "UnsupportedProtocol StreamError HTTPStatusError"),
    httpx2: ("TransportError", "UnsupportedProtocol StreamError HTTPStatusError"),
    google.auth.exceptions: ("TransportError TimeoutError ResponseError", ""),
    requests.exceptions: (
        "RequestException",
        "InvalidURL MissingSchema InvalidSchema URLRequired InvalidHeader TooManyRedirects"
        " StreamConsumedError UnrewindableBodyError HTTPError",
    ),
}
OF_A_NETWORK = re.compile(r"Connect|Timeout|Closed|Disconnect|Stream|Incomplete|HTTP|Transport")
# Named like one, and yet about something else.
OF_NO_NETWORK = {"EventStreamError", "UnseekableStreamError", "HTTPError"}


def _classes(library: ModuleType) -> Iterator[type[Exception]]:
    for _, cls in inspect.getmembers(library, inspect.isclass):
        own = cls.__module__.partition(".")[0] == library.__name__.partition(".")[0]
        if own and issubclass(cls, Exception) and not issubclass(cls, Warning):
            yield cls


def _made(cls: type[Exception]) -> Exception:
    """An exception of this class; none of their many constructors is called."""
    methods = {"__init__": lambda self: None, "__str__": lambda self: "text"}
    error: Exception = type(cls.__name__, (cls,), methods)()
    return error


def _may_pass(error: BaseException) -> bool:
    return isinstance(store_error(error, "a/x"), StoreUnavailableError)


@pytest.mark.parametrize("library", TREES, ids=lambda library: library.__name__)
def test_what_a_network_causes_may_pass_and_all_else_is_final(library: ModuleType) -> None:
    passing, final = (
        tuple(getattr(library, name) for name in names.split()) for names in TREES[library]
    )
    expected = {
        cls: issubclass(cls, passing) and not issubclass(cls, final) for cls in _classes(library)
    }
    judged = {cls.__name__: _may_pass(_made(cls)) for cls in expected}
    assert judged == {cls.__name__: may_pass for cls, may_pass in expected.items()}
    # A new version of a library may bring classes that nobody has looked at.
    named = {cls.__name__ for cls in expected if OF_A_NETWORK.search(cls.__name__)}
    looked_at = {cls.__name__ for cls in expected if issubclass(cls, passing + final)}
    assert named <= looked_at | OF_NO_NETWORK


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        *(
            (OSError(number, "x"), True)
            for number in (
                errno.ECONNREFUSED,
                errno.ECONNRESET,
                errno.EPIPE,
                errno.EHOSTUNREACH,
                errno.ENETUNREACH,
                errno.ENETDOWN,
                errno.ETIMEDOUT,
            )
        ),
        *((OSError(number, "x"), False) for number in (errno.EACCES, errno.ENOENT, errno.ENOSPC)),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
        (ssl.SSLError(1, "record layer failure"), True),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), False),
        (google.auth.exceptions.RefreshError("503", retryable=True), True),
        (google.auth.exceptions.RefreshError("invalid_grant"), False),
        (gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}), False),
        (gcsfs.retry.HttpError({"code": 503, "message": "Backend Error"}), True),
    ],
    ids=repr,
)
def test_what_is_no_class_of_its_own(error: Exception, may_pass: bool) -> None:
    assert _may_pass(error) is may_pass


@pytest.mark.parametrize(
    ("cause", "error", "may_pass"),
    [
        # gcsfs makes a 401 of every failed refresh of a token.
        (
            google.auth.exceptions.TransportError("no route"),
            gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}),
            True,
        ),
        (
            google.auth.exceptions.RefreshError("invalid_grant"),
            gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}),
            False,
        ),
        # The credentials of a machine come from a service of the machine.
        (
            botocore.exceptions.MetadataRetrievalError(error_msg="timed out"),
            botocore.exceptions.CredentialRetrievalError(provider="x", error_msg="timed out"),
            True,
        ),
        # botocore makes an SSLError of both.
        (
            ssl.SSLCertVerificationError(1, "self-signed certificate"),
            botocore.exceptions.SSLError(endpoint_url="https://x", error="x"),
            False,
        ),
        (
            ConnectionResetError(errno.ECONNRESET, "x"),
            botocore.exceptions.SSLError(endpoint_url="https://x", error="x"),
            True,
        ),
        (
            aiohttp.client_exceptions.InvalidUrlClientError("http://a b"),
            botocore.exceptions.HTTPClientError(error="x"),
            False,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_lies_behind_an_error_counts(
    cause: Exception, error: Exception, may_pass: bool
) -> None:
    error.__cause__ = cause
    assert _may_pass(error) is may_pass


def _refusal(status: int, code: str, region: str = "", **error: str) -> Exception:
    headers = {"x-amz-bucket-region": region} if region else {}
    answered = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    response: Any = {"Error": {"Code": code, **error}, "ResponseMetadata": answered}
    return botocore.exceptions.ClientError(response, "PutObject")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_refusal(301, "PermanentRedirect", "eu-west-1"), "the bucket is in eu-west-1: say so in"),
        (_refusal(301, "301", "eu-west-1"), "the bucket is in eu-west-1"),
        (_refusal(400, "AuthorizationHeaderMalformed", Region="us-east-2"), "is in us-east-2: say"),
        (_refusal(400, "ExpiredToken"), "HTTP 400 ExpiredToken; renew the credentials"),
        (_refusal(403, "RequestTimeTooSkewed"), "set the clock of this machine"),
    ],
)
def test_a_wrong_configuration_is_final_and_says_what_is_right(error: Exception, told: str) -> None:
    failure = store_error(error, "a/x")
    assert not isinstance(failure, StoreUnavailableError)
    assert told in str(failure)


@pytest.mark.parametrize("region", ["x", "eu-west-1\nrun this", "<b>"])
def test_a_region_is_told_as_far_as_it_is_one(region: str) -> None:
    for error in (
        _refusal(301, "PermanentRedirect", region),
        _refusal(403, "AccessDenied", "eu-west-1"),
    ):
        assert "the bucket is in" not in str(store_error(error, "a/x"))


def _at(address: str) -> Store:
    options = {"endpoint_url": address, "key": "AKIAFORTESTS", "secret": "a secret"}
    return Store("s3://bucket/x", options=options)


async def _calls(store: Store, tmp_path: Path) -> list[StoreError]:
    """What each kind of call ends with."""
    file = tmp_path / "shard"
    file.write_bytes(b"x")
    errors = []
    for call in (
        store.names(""),
        store.size("a"),
        store.read_bytes("a", limit_bytes=1),
        store.put_bytes(b"x", "a"),
        store.create_bytes(b"x", "a"),
        store.put_file(file, "a"),
        store.get_file("a", tmp_path / "back"),
        store.delete_file("a"),
        store.abort_orphaned_uploads(),
    ):
        with pytest.raises(StoreError) as caught:
            await call
        errors.append(caught.value)
    return errors


async def test_a_port_that_refuses_may_answer_later(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, never listening
        bound.bind(("127.0.0.1", 0))
        errors = await _calls(_at(f"http://127.0.0.1:{bound.getsockname()[1]}"), tmp_path)
    assert {type(error) for error in errors} == {StoreUnavailableError}
    assert "no connection to the store (EndpointConnectionError)" in str(errors[0])


async def test_a_name_that_is_not_resolved_may_be_later(tmp_path: Path) -> None:
    errors = await _calls(_at("http://store.invalid"), tmp_path)
    assert {type(error) for error in errors} == {StoreUnavailableError}


@pytest.mark.parametrize("resets", [True, False])
async def test_a_line_that_breaks_may_hold_later(
    s3_server: StoreServer, tmp_path: Path, resets: bool
) -> None:
    async with proxying(str(s3_server.options["endpoint_url"])) as proxy:
        proxy.cut_after, proxy.resets = 0, resets
        options = {**s3_server.options, "endpoint_url": proxy.address}
        errors = await _calls(Store(f"{s3_server.url}/x", options=options), tmp_path)
    assert {type(error) for error in errors} == {StoreUnavailableError}
