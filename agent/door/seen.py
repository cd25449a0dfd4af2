"""What a door sees of its agents, and whom of them it believes.

An agent that is away, that is not what it was, or that says what cannot be is shown as one that is
not ready: nobody is told that weights are served which may not be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from urllib.parse import urlsplit

import httpx

from agent.fleet.report import LOOK_PATH, REPORT_LIMIT_BYTES, REPORT_PATH, AgentReport
from agent.fleet.state import FleetState
from hotload.clients.access import tls_context
from hotload.errors import StoreError

ANSWER_SECONDS = 5.0
HEARD_SECONDS = 60.0  # in which every agent has looked at a log that was just begun
UNKNOWN = AgentReport(name="unknown", engine="", readiness=False)


@dataclass(frozen=True, slots=True)
class SeenAgent:
    """One agent as it shows itself; `problem` says why it is not believed."""

    url: str
    report: AgentReport
    problem: str = ""

    @property
    def is_believed(self) -> bool:
        """Whether what it says counts."""
        return not self.problem

    def is_on(self, identity: str | None) -> bool:
        """Tell whether it can be relied on to answer with a snapshot, None for base weights."""
        return self.is_believed and self.report.readiness and self.report.current == identity

    def has_settled(self, state: FleetState) -> bool:
        """Tell whether it serves what it is to serve, or has failed to."""
        head, report = state.head_for(self.report.name), self.report
        is_there = report.readiness and report.current == head
        return is_there or (report.stage == "error" and report.target == head)


async def ask_all(urls: Sequence[str]) -> list[SeenAgent]:
    """Ask every agent for its report, at once; one that gives none has a problem."""
    async with _client() as client:
        seen = await asyncio.gather(*(_ask(client, url) for url in urls))
    names = Counter(one.report.name for one in seen if one.is_believed)
    servers = Counter(_server(one) for one in seen if one.is_believed)
    return [
        replace(one, problem=one.problem or _claimed_twice(one, names, servers)) for one in seen
    ]


def doubt(
    agents: Sequence[SeenAgent],
    state: FleetState,
    content_of: Mapping[str, str | None],
    now: datetime,
) -> list[SeenAgent]:
    """Hold the agents' words to the ledger, to the digest of what an identity stands for, and where
    nobody recorded one, to each other's: of those that differ, none is believed."""
    told: dict[str | None, set[str]] = {}
    for one in agents:
        if one.is_believed and one.report.content_sha256:
            told.setdefault(one.report.current, set()).add(one.report.content_sha256)
    is_log_old = state.began is not None and (now - state.began).total_seconds() > HEARD_SECONDS
    return [
        replace(one, problem=one.problem or _doubt(one, state, content_of, told, is_log_old))
        for one in agents
    ]


def _doubt(
    seen: SeenAgent,
    state: FleetState,
    content_of: Mapping[str, str | None],
    told: Mapping[str | None, set[str]],
    is_log_old: bool,
) -> str:
    report, current = seen.report, seen.report.current
    if not seen.is_believed:
        return ""
    if report.remark and is_log_old:  # its bucket, or its names, are not those of this door
        return f"looks elsewhere: {report.remark}"
    if current is None:
        return ""
    if state.ledger.get(current) is None:
        return f"serves {current}, which is not in the log of this fleet"
    if report.content_sha256 is None:  # told as soon as it has digested what it serves
        return ""
    if expected := content_of.get(current):
        is_it = report.content_sha256 == expected
        return "" if is_it else f"serves other bytes than {current} stands for"
    return "" if len(told[current]) == 1 else f"agents serve different bytes as {current}"


def _server(seen: SeenAgent) -> tuple[str | None, str]:
    """Identify the server beside an agent: its machine, and its address, which may be loopback."""
    return urlsplit(seen.url).hostname, seen.report.serves


def _claimed_twice(
    seen: SeenAgent, names: Counter[str], servers: Counter[tuple[str | None, str]]
) -> str:
    if names[seen.report.name] > 1:
        return f"another agent is called {seen.report.name}, too"
    if seen.report.serves and servers[_server(seen)] > 1:
        same = f"another agent stands beside the same server, {seen.report.serves}"
        return f"{same}; where they are two, --serves tells them apart"
    return ""


async def nudge(urls: Sequence[str]) -> None:
    """Let every agent look at the log now; one that does not hear looks by itself."""

    async def post(url: str) -> None:
        with suppress(httpx.HTTPError, TimeoutError):
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                client.stream("POST", f"{url}{LOOK_PATH}"),  # what it answers is not read
            ):
                pass

    async with _client() as client:
        await asyncio.gather(*map(post, urls))


def _client() -> httpx.AsyncClient:
    """A client for these calls alone: none outlives the event loop that it was made in."""
    return httpx.AsyncClient(verify=tls_context(), timeout=ANSWER_SECONDS, trust_env=False)


async def _ask(client: httpx.AsyncClient, url: str) -> SeenAgent:
    try:
        async with (
            asyncio.timeout(ANSWER_SECONDS),
            client.stream("GET", f"{url}{REPORT_PATH}") as answer,
        ):
            data = b""
            async for piece in answer.aiter_bytes():
                data += piece
                if len(data) > REPORT_LIMIT_BYTES:
                    break
            if answer.status_code != 200:
                return SeenAgent(url, UNKNOWN, f"answers {answer.status_code}")
        return SeenAgent(url, AgentReport.parse_stored(data, url))
    except TimeoutError:
        return SeenAgent(url, UNKNOWN, f"no whole report within {ANSWER_SECONDS:g} s")
    except httpx.HTTPError as error:
        return SeenAgent(url, UNKNOWN, f"{type(error).__name__}: {error}")
    except StoreError as error:
        return SeenAgent(url, UNKNOWN, error.reason)
