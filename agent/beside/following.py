"""Following the log of a fleet: look, load what is new, look at the engine, wait."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from agent.beside.engine_replica import EngineReplica
from agent.fleet.log import FleetLog
from hotload.errors import StoreError

logger = logging.getLogger(__name__)


class Following:
    """A replica that follows its fleet until it is cancelled; `look` says that there is news."""

    def __init__(self, replica: EngineReplica, log: FleetLog, poll_seconds: float) -> None:
        self.replica, self._log, self._poll_seconds = replica, log, poll_seconds
        self._news = asyncio.Event()
        self._canary: str | None = None

    def look(self) -> None:
        """Look now, and not when the time has come."""
        self._news.set()

    def stands_by(self, identity: str) -> bool:
        """Tell whether a snapshot is loaded by canaries, and not here before it is released."""
        return identity == self._canary

    async def follow(self) -> None:
        """Follow the log. What may pass is tried again at the next look, and waits for no news."""
        await self.replica.come_up()
        while True:
            self._news.clear()
            try:
                state = await self._log.read()
            except StoreError as error:
                if str(error) != self.replica.trouble:
                    logger.warning("%s: %s", self.replica.name, error)
                self.replica.trouble = str(error)
            else:
                self.replica.trouble, before = "", self.replica.remark
                self.replica.remark = self._log.remark(state)
                if self.replica.remark not in ("", before):
                    logger.warning("%s: %s", self.replica.name, self.replica.remark)
                canary = state.canary
                is_mine = canary is None or self.replica.name in canary.canaries
                self._canary = None if is_mine or canary is None else canary.identity
                self.replica.catch_up(state.chain_for(self.replica.name))
            await self.replica.look_at_engine()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._news.wait()
