"""The other agents of a site, which are asked for a file before the store is.

Who reads a file from the store follows from its name: all agents put the same addresses into the
same order for it, the first that answers reads, and the others wait for those before them alone.
Nothing that a peer says is believed: a file counts once its bytes have the digest that the
publisher's record, read from the store, names. Every wait has an end; then the store is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import quote

import aiohttp

from agent.fleet.addresses import Addresses
from hotload.clients.access import tls_context
from hotload.records import FileDigest

FILES_PATH = "/agent/files"
ASKER_HEADER = "hotload-asker"
NOW = "?now"  # what is not there yet is not waited for
CONNECT_SECONDS, STALL_SECONDS = 2.0, 5.0
# One peer may let a file wait, or take to send it, for that long and a second for so many bytes.
PATIENCE_SECONDS, BYTES_A_SECOND = 10.0, 5_000_000
START_SECONDS = 10.0  # until a peer that is to load the same has heard of it
ASIDE_SECONDS = 60.0  # for which a peer that failed is not asked
ASKED_AT_ONCE = 16
CHUNK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class Reply(Enum):
    """What came of asking one peer for a file; the values are statuses of HTTP."""

    TAKEN = 200
    COMING = 202
    UNKNOWN = 404
    GONE = 410
    OWN = 421
    BUSY = 503
    FAILED = 0


def patience(size_bytes: int) -> float:
    """Say how many seconds a file of that size may take at one peer."""
    return PATIENCE_SECONDS + size_bytes / BYTES_A_SECOND


@dataclass(slots=True)
class Peers:
    """The agents of a site by their addresses, this one among them, and the key they share."""

    addresses: Addresses
    key: str = field(repr=False)
    name: str = field(default_factory=lambda: secrets.token_hex(16))
    """Of this process: an agent that is asked by itself knows it by that."""
    _own: set[str] = field(default_factory=set)
    _aside: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the key.

        Raises:
            ValueError: it cannot be sent; does not show it.
        """
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ValueError("the peers' key has characters that no key has, a line end perhaps")

    def accepts(self, authorization: str) -> bool:
        """Tell whether a request carries the key."""
        return hmac.compare_digest(authorization.encode(), f"Bearer {self.key}".encode())

    @asynccontextmanager
    async def asking(self, identity: str) -> AsyncIterator[Asking]:
        """Ask for files of one snapshot until the block ends."""
        headers = {"authorization": f"Bearer {self.key}", ASKER_HEADER: self.name}
        async with aiohttp.ClientSession(
            headers=headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=ASKED_AT_ONCE, ssl=tls_context()),
            read_bufsize=CHUNK_BYTES // 4,
        ) as session:
            yield Asking(self, session, identity, await self.addresses.all())

    def order(self, urls: list[str], file: str) -> list[str]:
        """Put addresses into the order for one file, the same wherever it is asked (rendezvous)."""
        return sorted(urls, key=lambda url: hashlib.sha256(f"{file} {url}".encode()).digest())

    def is_own(self, url: str) -> bool:
        """Tell whether this agent has been found to answer there."""
        return url in self._own

    def is_aside(self, url: str) -> bool:
        """Tell whether a peer failed a moment ago."""
        return self._aside.get(url, 0.0) > time.monotonic()

    def note(self, url: str, answer: Reply, reason: str) -> None:
        """Learn from an answer."""
        if answer is Reply.OWN:
            self._own.add(url)
        elif answer is Reply.FAILED and not self.is_aside(url):
            self._aside[url] = time.monotonic() + ASIDE_SECONDS
            logger.warning("peer %s is not asked for %.0f s: %s", url, ASIDE_SECONDS, reason)


class Asking:
    """Files of one snapshot, asked of every peer that may have them."""

    def __init__(
        self, peers: Peers, session: aiohttp.ClientSession, identity: str, urls: list[str]
    ) -> None:
        self._peers, self._session, self._identity, self._urls = peers, session, identity, urls
        self._began = time.monotonic()
        self._slots = asyncio.Semaphore(ASKED_AT_ONCE)
        self._absent: set[str] = set()  # that do not load this snapshot, or have it no more

    async def take(self, file: FileDigest, target: Path) -> bool:
        """Write a file to `target` as a peer has it; False where it is to be read from the store,
        since this agent is the one to do so, or no peer has delivered it in time.

        Raises:
            OSError: this machine's disk is full.
        """
        end: float | None = None
        order = self._peers.order(self._urls, f"{self._identity}/{file.file}")
        for number, url in enumerate(order):
            if not self._may_have(url):
                continue
            if not self._peers.is_own(url):
                answer, since = await self._wait(url, file, target)
                if answer is Reply.TAKEN:
                    return True
                end = end or since + 2 * patience(file.size_bytes)
            if self._peers.is_own(url):  # who comes after canaries, or late, finds it all the same
                for later in filter(self._may_have, order[number + 1 :][:ASKED_AT_ONCE]):
                    answer, _ = await self._wait(later, file, target, is_owner=True)
                    if answer is Reply.TAKEN:
                        return True
                return False
            if end and time.monotonic() > end:
                break
        return False

    async def _wait(
        self, url: str, file: FileDigest, target: Path, *, is_owner: bool = False
    ) -> tuple[Reply, float]:
        """Ask one peer until it has delivered, or shown that it will not; the moment is that of
        its first answer. Who is to read the file itself waits for none that is not there."""
        since, answer = 0.0, Reply.UNKNOWN
        while True:
            is_early = time.monotonic() < self._began + START_SECONDS
            waits = not is_owner and (is_early or answer is Reply.COMING)
            answer = await self._ask(url, file, target, waits=waits)
            since = since or time.monotonic()
            if answer is Reply.BUSY and (others := self._others(url)):
                # Those that it was sent to before pass it on: a large file spreads as a tree does.
                other = await self._ask(random.choice(others), file, target)
                answer = Reply.TAKEN if other is Reply.TAKEN else answer
            may_come = answer is Reply.COMING or (answer is Reply.UNKNOWN and is_early)
            if answer is not Reply.BUSY and (is_owner or not may_come):
                if answer is Reply.GONE or (answer is Reply.UNKNOWN and not is_early):
                    self._absent.add(url)
                return answer, since
            if time.monotonic() > since + patience(file.size_bytes):
                self._peers.note(url, Reply.FAILED, f"no {file.file} of {self._identity} in time")
                return Reply.FAILED, since
            await asyncio.sleep(random.uniform(0.02, 0.1))

    def _others(self, url: str) -> list[str]:
        others = (one for one in self._urls if one != url and not self._peers.is_own(one))
        return [*filter(self._may_have, others)]

    def _may_have(self, url: str) -> bool:
        return url not in self._absent and not self._peers.is_aside(url)

    async def _ask(self, url: str, file: FileDigest, target: Path, *, waits: bool = True) -> Reply:
        path = f"{FILES_PATH}/{quote(self._identity, safe='')}/{quote(file.file, safe='')}"
        timeout = aiohttp.ClientTimeout(
            total=patience(file.size_bytes), sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS
        )
        reason = ""
        try:
            async with (
                self._slots,
                self._session.get(
                    f"{url}{path}{'' if waits else NOW}", timeout=timeout, allow_redirects=False
                ) as answered,
            ):
                known = {one.value for one in Reply}
                answer = Reply(answered.status if answered.status in known else 0)
                if answer is Reply.TAKEN:
                    reason = await _receive(answered.content, file, target)
                elif answer is Reply.FAILED:
                    reason = f"answers {answered.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        answer = Reply.FAILED if reason else answer
        self._peers.note(url, answer, f"{self._identity}/{file.file}: {reason}")
        return answer


async def _receive(body: aiohttp.StreamReader, file: FileDigest, target: Path) -> str:
    """Write at most the file's size; what is wrong with what came, or nothing."""
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as out:
        async for piece in body.iter_any():
            size += len(piece)
            if size > file.size_bytes:
                break
            digest.update(piece)
            out.write(piece)
    if (size, digest.hexdigest()) == (file.size_bytes, file.sha256):
        return ""
    return f"sends other bytes than the publisher's record names, {size} of {file.size_bytes}"
