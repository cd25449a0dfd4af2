"""The fenced log that every lease lies in: numbered entries, each created only if absent.

All readers agree on the order of the entries, and of several writers of one number exactly one
succeeds. So whoever wrote the number after the last has taken over from everybody before, and a
writer that was overtaken learns it when it reads its own number back, whatever the clocks say. What
the entries mean is decided in `hotload.publish.lease` (who publishes) and in
`hotload.dataset.claims` (which consumer has which groups).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from hotload.clients.store.store import Store
from hotload.errors import StoreError, StoreUnavailableError


@dataclass(frozen=True)
class LeaseLog:
    """Entries `<directory>/<number>.json`, numbers from `first` on with `digits` digits.

    Every call raises StoreError where the store refuses, or an entry is larger than `limit_bytes`.
    """

    store: Store
    directory: str
    first: int
    digits: int
    limit_bytes: int

    def path(self, number: int) -> str:
        """Name the place of an entry in the store.

        Raises:
            StoreError: the number has more digits. It would not be found again: the entry of the
                greatest number hides all that come after it.
        """
        if number >= 10**self.digits:
            last = f"{self.directory}/{'9' * self.digits}.json"
            raise StoreError(last, "no entry can follow it; remove it where it is none of ours")
        return f"{self.directory}/{number:0{self.digits}d}.json"

    def number_of(self, name: str) -> int | None:
        """Read the number from an entry's file name; None for any other name."""
        stem, dot, suffix = name.partition(".")
        is_number = len(stem) == self.digits and stem.isascii() and stem.isdigit()
        is_entry = is_number and dot + suffix == ".json" and int(stem) >= self.first
        return int(stem) if is_entry else None

    async def numbers(self) -> list[int]:
        """List the numbers of the entries there are, ascending."""
        names = await self.store.names(self.directory)
        return sorted(number for number in map(self.number_of, names) if number is not None)

    async def create(self, number: int, data: bytes) -> None:
        """Write an entry unless there is one; read the log to learn whose it is.

        The store's own answer is not passed on: it can be lost on the way after the entry was
        written. What is stored decides.
        """
        await self.store.create_bytes(data, self.path(number))

    async def last(self) -> tuple[int, bytes] | None:
        """Read the entry with the highest number; None without any."""
        while numbers := await self.numbers():
            path = self.path(numbers[-1])
            try:
                data = await self.store.read_bytes(path, limit_bytes=self.limit_bytes)
            except StoreUnavailableError:
                raise
            except StoreError:
                # Removed since it was listed, by the writer of a higher number: look again.
                if await self.store.size(path) is not None:
                    raise
            else:
                return numbers[-1], data
        return None

    async def read_from(self, number: int) -> AsyncIterator[tuple[str, bytes]]:
        """Read the entries from `number` on, each with its path, up to the first gap."""
        numbers = set(await self.numbers())
        while number in numbers:
            path = self.path(number)
            yield path, await self.store.read_bytes(path, limit_bytes=self.limit_bytes)
            number += 1

    async def remove_before(self, number: int) -> None:
        """Remove the entries below `number`."""
        for old in await self.numbers():
            if old < number:
                await self.store.delete_file(self.path(old))
