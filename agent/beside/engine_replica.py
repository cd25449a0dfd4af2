"""A replica whose engine is a server of its own, which reads what lies behind one link."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from agent.beside.peered_disk import PeeredDisk
from agent.beside.peers import Peers
from agent.beside.seal import read_seal, seal
from agent.engines.reloading import (
    EngineAwayError,
    EngineDiedError,
    EngineError,
    Reload,
    ReloadingEngine,
    reload_under_way,
)
from agent.fleet.report import AgentReport
from agent.fleet.state import REASON_CHARS
from agent.loading.bucket import BucketError, MissingObjectError, SnapshotBucket
from agent.loading.disk import Disk, Load
from agent.loading.loader import Loader
from hotload.clients.store.records import SNAPSHOTS
from hotload.directory.files import sha256_file, sync_directory
from hotload.errors import ChecksumMismatchError, DeltaError
from hotload.identity import SnapshotKind
from hotload.publish.snapshot import SnapshotManifest, content_sha256
from hotload.sampling.reward.user_errors import replace_surrogates

BASE = "base"  # the version that an engine is given with the base model
UNNAMED = (None, "default", BASE)  # what an engine reports that was given no snapshot
BOOT = Path("/proc/sys/kernel/random/boot_id")
TELL_AGAIN_SECONDS = 30.0  # to an engine that refused, and is not ready
DYING_SECONDS = 6.0  # for which a server may answer whose engine is dead: vLLM looks every 5 s
DYING_LOOK_SECONDS = 0.2
PASSING = (BucketError, EngineAwayError)

logger = logging.getLogger(__name__)


class _Checked(NamedTuple):
    """What was read before the engine is told to load: the publisher's record, and the digests of
    a full snapshot's files."""

    record: SnapshotManifest | None
    digests: dict[str, str] | None = None


class EngineReplica(Loader):
    """Keeps the checkpoint behind `link` what it is to be, and its engine on that.

    `directory` holds two copies while one is made. The link changes in one step, before the engine
    reloads, so an engine that restarts always reads whole weights through it, and not again before
    that reload has ended. Where a reload fails, link and engine go back to what was served.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        bucket: SnapshotBucket,
        threads: Executor,
        engine: ReloadingEngine,
        *,
        engine_kind: str,
        serves: str = "",
        base: Path | None = None,
        peers: Peers | None = None,
        workers: int = 1,
    ) -> None:
        self.peered = PeeredDisk(directory, bucket, peers, workers=workers) if peers else None
        disk = self.peered or Disk(directory, bucket, workers=workers)
        super().__init__(name, disk, threads)
        self.link = directory / "current"
        self.readiness = False
        self.trouble = self.remark = ""  # of whoever follows the log with it
        self._load_error, self._engine_error = "", "not yet looked at its engine"
        self._directory, self._bucket, self._engine = directory, bucket, engine
        self._engine_kind, self._serves = engine_kind, serves
        self._base, self._workers = base, workers
        self._served: Path | None = None
        self._content: str | None = None
        self._last: str | None = None
        self._past: frozenset[str] = frozenset()
        self._is_told = False
        self._refused: str | None = None
        self._died_of = ""  # the snapshot in whose reload the engine has died
        self._told_at = -inf
        # This file exists while the engine reloads, and stays if that fails or is cut short: half
        # of the engine's weights may then be new, whatever version it reports. It names this start
        # of the machine: until the next, what was written is whole without having been sealed.
        # It also stays where an engine that reports no version has nothing to go back to.
        self._doubt = directory / "telling"

    def report(self) -> AgentReport:
        """Say what is served, and how far what is loading has come."""
        errors = filter(None, (self._load_error, self._engine_error, self.trouble))
        return AgentReport(
            name=self.name,
            engine=self._engine_kind,
            readiness=self.readiness,
            current=self.current,
            stage=self.stage,
            target=self.target or None,
            content_sha256=self._content,
            error=replace_surrogates("; ".join(errors))[:REASON_CHARS],
            serves=self._serves,
            remark=self.remark[:REASON_CHARS],
        )

    async def come_up(self) -> None:
        """Find what is whole of what an earlier process kept, and remove the rest."""
        target = self.link.resolve() if self.link.is_symlink() else Path()
        kept = [*(self._directory / "held").glob("*")]
        begun = target if target in kept and self._reload_had_begun() else None
        # The one that was served, else the one before it, which goes when that is sealed.
        for path in sorted(kept, key=lambda one: one.name != target.name):
            digests = await self._in_thread(read_seal, path)
            if digests is not None:
                self._held = self._served = path
                self._content = content_sha256(digests)
                break
            if path != begun:
                logger.warning("%s: %s is torn, or was not sealed", self.name, path.name)
        await self._in_thread(self._disk.forget_others, self._held, begun)
        if begun is not None and begun != self._held:
            self._begin(partial(self._finish, begun))
        elif (directory := self._held or self._base) is not None:
            self._point_at(directory)

    def catch_up(self, chain: Sequence[Load]) -> None:
        """Load what is missing of a chain, unless something is loading, or it failed before."""
        if self.is_busy:
            return
        if not chain and self._held is not None:
            self._begin(self._forget)
            return
        names = [load.identity for load in chain]
        held = self._held.name if self._held else None
        done = names.index(held) + 1 if held in names else 0
        steps, self._past = chain[done:], frozenset(names[:done])
        if not steps:
            if self.stage == "pending" or not chain:  # it is not to be loaded any more
                self.stage, self.target, self._load_error = "idle", "", ""
        elif not (self.stage == "error" and self.target == names[-1]):
            self._last = names[-1]
            self._begin(partial(self._load_all, steps))

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being loaded, or the engine is being told to load one."""
        return self._task is not None and not self._task.done()

    def is_past(self, identity: str) -> bool:
        """Tell whether what is held was made of that snapshot: it is not fetched again."""
        return identity in self._past

    async def look_at_engine(self) -> None:
        """See whether the engine answers with what is held; tell it again where it does not, and
        nothing is loading. What is being told to it is not looked at."""
        if self._is_telling():
            return
        try:
            version = await self._engine.version()
        except EngineError as error:
            if not self._is_telling():
                self.readiness, self._engine_error = False, str(error)
                self._told_at = -inf  # who answers next may be another
            return
        if self._is_telling():  # since it was asked
            return
        expected = (self._served.name,) if self._served else UNNAMED
        is_right = version in expected if self._engine.tells_version else self._is_told
        is_right |= self._served is None and not self._is_told and version in UNNAMED
        if is_right and not self._doubt.exists():
            self.readiness, self._is_told = True, True
            self.current = self._served.name if self._served else None
            self._engine_error = ""
            return
        # What it refused once it may take later: it may have been started anew in between.
        is_new = self.readiness or version != self._refused
        if is_new or monotonic() - self._told_at > TELL_AGAIN_SECONDS:
            self.readiness = False
            if not self.is_busy:
                self._refused, self._told_at = version, monotonic()
                self._begin(self._go_back)

    # What the loader asks.

    async def _may_begin(self, load: Load) -> bool:
        """Return once the engine answers; one that is away, or goes, costs no download."""
        end = monotonic() + DYING_SECONDS
        while True:
            try:
                await self._engine.version()
            except EngineAwayError:
                raise
            except EngineError:
                if monotonic() > end:
                    raise
                await asyncio.sleep(DYING_LOOK_SECONDS)
            else:
                return True

    async def _weights(self, load: Load, arrived: Path) -> _Checked:
        """Digest a full before it is served: nothing but the publisher's record tells its bytes.
        Every tensor of a delta was held to its checksum. The record is read here in any case: if
        the store failed after the engine had loaded, the engine would have to go back."""
        if load.kind is SnapshotKind.LORA:
            raise DeltaError(load.identity, "an adapter, which no agent loads")
        record = await self._in_thread(self._record, load.identity)
        if load.kind is SnapshotKind.DELTA:
            return _Checked(record)
        return _Checked(record, await self._in_thread(self._digests, record, arrived))

    def _kept_beside(self, load: Load) -> Sequence[Path | None]:
        return [self._served, self.peered.arriving(load.identity) if self.peered else None]

    async def _swap(self, weights: _Checked | None, load: Load, kept: Path) -> None:
        if load.identity != self._last:
            return  # a step on the way: the engine goes to the last at once
        self.readiness, before = False, (self._served, self._content)
        try:
            await self._tell(kept, load)
            self._served, self._content = kept, None
            self.current, self.stage, self.readiness = load.identity, "completed", True
            self._load_error = self._engine_error = ""
            checked = weights or _Checked(await self._in_thread(self._record, load.identity))
            if (digests := checked.digests) is None:
                digests = await self._in_thread(self._digests, checked.record, kept)
            await self._in_thread(seal, kept, digests)
        except Exception as error:  # an agent that is ended in between leaves all as a kill does
            self._served, self._content = before
            is_back = await self._go_back()
            had_begun = isinstance(error, EngineError) and not isinstance(error, EngineAwayError)
            if had_begun and not is_back and await self._ends():
                raise EngineDiedError(str(error)) from None
            raise
        self._content = content_sha256(digests)
        self._died_of = ""
        _, *beside = self._kept_beside(load)
        await self._in_thread(self._disk.forget_others, kept, *beside)

    def _fail(self, load: Load, error: Exception) -> None:
        super()._fail(load, error)
        self._held = self._served
        self._load_error = f"{load.identity}: {type(error).__name__}: {error}"
        may_pass = isinstance(error, PASSING) and not isinstance(error, MissingObjectError)
        if isinstance(error, EngineDiedError):  # once by chance, twice by these weights
            may_pass, self._died_of = self._died_of != load.identity, load.identity
        if may_pass:
            self.stage = "pending"  # tried again at the next look

    def _log(self, load: Load, result: str, detail: str | None) -> None:
        level = logging.WARNING if detail else logging.INFO
        logger.log(level, "%s: %s %s %s", self.name, load.identity, result, detail or "")

    # Its own.

    async def _load_all(self, steps: Sequence[Load]) -> None:
        """Load one after the other. What fails on the way has failed for the last, or is tried
        again with it."""
        for load in steps:
            await self._load(load)
            if self.stage in ("pending", "error"):
                self.target = steps[-1].identity
                return

    def _record(self, identity: str) -> SnapshotManifest | None:
        """Read the publisher's record; None if the publisher left none."""
        try:
            data = self._bucket.read(SNAPSHOTS, f"{identity}.json")
        except MissingObjectError:
            return None
        return SnapshotManifest.parse(data, identity=identity)

    def _digests(self, record: SnapshotManifest | None, directory: Path) -> dict[str, str]:
        """Digest every file, and hold it to the publisher's record where there is one."""
        files = sorted(path for path in directory.iterdir() if path.is_file())
        with ThreadPoolExecutor(self._workers, "digest") as pool:
            found = pool.map(sha256_file, files)
            digests = {path.name: digest for path, digest in zip(files, found, strict=True)}
        if record is not None:
            for file in (*record.content.shards, *record.content.side_files):
                digest = digests.get(file.file, "no such file")
                if digest != file.sha256:
                    place = f"{record.identity}/{file.file}"
                    raise ChecksumMismatchError(place, digest, file.sha256)
        return digests

    async def _finish(self, kept: Path) -> None:
        """Go on with a reload that an earlier process had begun. The engine may still be reading:
        the link stays, and it is told again what it was told."""
        load = Load(kept.name, SnapshotKind.FULL, None)
        self.stage, self.target, self._last = "pending", load.identity, load.identity
        self._held = kept
        try:
            await self._swap(None, load, kept)
        except Exception as error:  # noqa: BLE001 - as any other load
            self._fail(load, error)

    async def _tell(self, directory: Path, load: Load) -> None:
        """Point the link at a directory, let the engine load it, and ask what it serves."""
        self._is_told = False
        self._doubt.write_text(_this_boot())
        self._point_at(directory)
        policy = load.reset_prompt_cache
        await self._engine.reload(Reload(self.link, load.identity, load.transition, policy))
        with reload_under_way():
            found = await self._engine.version() if self._engine.tells_version else load.identity
        if found != load.identity:
            raise EngineError(f"the engine reports {found!r} after it was given {load.identity!r}")
        self._doubt.unlink()
        self._is_told = True

    async def _go_back(self) -> bool:
        """Let the engine serve again what it served; False where it does not, and is not ready."""
        self.readiness = False
        directory, self._held = self._served or self._base, self._served
        self.current = None
        if directory is None:
            self.link.unlink(missing_ok=True)
            if not self._engine.tells_version:  # it may serve on, and cannot be asked what
                self._doubt.touch()
            self._engine_error = "no weights are known to be served, and no base model was named"
            return False
        name = self._served.name if self._served else BASE
        try:
            await self._tell(directory, Load(name, SnapshotKind.FULL, None))
        except (EngineError, OSError) as error:  # a full disk, too, is tried again
            self._engine_error = str(error)
            return False
        self.current, self.readiness = self._served.name if self._served else None, True
        self._engine_error = ""
        return True

    async def _ends(self) -> bool:
        """Tell whether the engine is gone, or will be: one that is dead answers for a moment."""
        end = monotonic() + DYING_SECONDS
        while True:
            try:
                await self._engine.version()
            except EngineAwayError:
                return True
            except EngineError as error:
                self._engine_error = str(error)
            if monotonic() > end:
                return False
            await asyncio.sleep(DYING_LOOK_SECONDS)

    async def _forget(self) -> None:
        """Serve base weights, as after a reset of the ledger. What was held goes first: an agent
        that is started again amid the reload finds nothing to turn the link to."""
        if self._base is not None:
            self._point_at(self._base)
        await self._in_thread(self._disk.forget_others)
        self._served, self._content, self._is_torn = None, None, False
        self.stage, self.target, self._load_error = "idle", "", ""
        await self._go_back()

    def _reload_had_begun(self) -> bool:
        """Tell whether the engine may be reading what the link leads to, all of which is there."""
        return self._doubt.exists() and self._doubt.read_text() == _this_boot() != ""

    def _is_telling(self) -> bool:
        return self.is_busy and not self._is_told

    def _point_at(self, directory: Path) -> None:
        partial = self.link.with_name(f".current.{secrets.token_hex(4)}")
        partial.symlink_to(directory.resolve(), target_is_directory=True)
        os.replace(partial, self.link)
        sync_directory(self.link.parent)


def _this_boot() -> str:
    """Name this start of the machine; empty where it has no name."""
    return BOOT.read_text().strip() if BOOT.exists() else ""
