"""Where the agents of a fleet are: listed, or found by a name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hotload.clients.access import check_origin


@dataclass(frozen=True, slots=True)
class Addresses:
    """Agents by their addresses, and all that answer to `HOST:PORT` in the DNS."""

    listed: Sequence[str] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: no address, or a name that is not HOST:PORT.
        """
        for url in self.listed:
            check_origin(url)
        if self.name is not None:
            host, _, port = self.name.rpartition(":")
            try:
                is_host = bool(host.encode("idna"))  # which the look-up does, and fails otherwise
            except UnicodeError:
                is_host = False
            if not (is_host and port.isdecimal() and 0 < int(port) < 1 << 16):
                raise ValueError(f"{self.name}: expected HOST:PORT")

    async def all(self) -> list[str]:
        """List them now, each once; a name that is not known at the moment has none."""
        found = [url.rstrip("/") for url in self.listed]
        if self.name is not None:
            host, _, port = self.name.rpartition(":")
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(
                    host, int(port), type=socket.SOCK_STREAM
                )
            except socket.gaierror:
                answers = []
            hosts = sorted(str(address[0]) for *_, address in answers)
            found += [f"http://{f'[{one}]' if ':' in one else one}:{port}" for one in hosts]
        return list(dict.fromkeys(found))
