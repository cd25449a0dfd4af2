"""Arrivals: the checkpoints that a trainer has put below a directory or a prefix of a bucket, and
which are complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from hotload.checkpoint.names import INDEX_FILE
from hotload.checkpoint.safetensors import SHARD_SUFFIX, name_obstacle, read_json_object
from hotload.directory.files import refuse_file, refuse_unreadable
from hotload.directory.places import Directory, RemotePlace
from hotload.directory.shards import open_shard, read_document
from hotload.errors import InvalidCheckpointError, StoreUnavailableError


@dataclass(frozen=True, slots=True)
class Arrival:
    """A version that a trainer has begun to write; `waits_for` says what it lacks, if anything."""

    version: int
    directory: Path | RemotePlace
    waits_for: str = ""


def find_arrivals(
    parent: Path | RemotePlace,
    name: re.Pattern[str],
    *,
    after: int | None,
    marker: str | None,
    still_seconds: float,
    now: float,
) -> tuple[Arrival, ...]:
    """List the versions below `parent` that come after a version, oldest first.

    A version is complete when its `marker` is there; without a marker, when its index and every
    shard that it names are whole and nothing has been written for `still_seconds`. Two directories
    of one version wait for a person.

    Args:
        name: of a whole directory's name; its group `version` is the policy version, in at most
            nine digits.
        after: earlier versions are not looked at; None looks at all.
        now: seconds since the epoch.

    Raises:
        InvalidCheckpointError: `parent` is no directory that can be read.
        StoreUnavailableError: it lies in a store that is away.
    """
    found: dict[int, Arrival] = {}
    for directory in _places_in(parent):
        version = _version_of(directory.name, name)
        if version is None or (after is not None and version <= after):
            continue
        waits_for = _what_is_missing(directory, marker, still_seconds, now)
        if waits_for is None:
            continue
        if version in found:
            both = f"{found[version].directory.name} and {directory.name}"
            waits_for = f"one directory of version {version}: there are {both}"
        found[version] = Arrival(version, directory, waits_for)
    return tuple(found[version] for version in sorted(found))


def _version_of(directory: str, name: re.Pattern[str]) -> int | None:
    matched = name.fullmatch(directory)
    text = matched["version"] if matched else None
    return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else None


def strangers_among(parent: Path | RemotePlace, name: re.Pattern[str]) -> tuple[str, ...]:
    """Name the entries below `parent`, where there are some and none is named as a version is.

    Raises:
        As `find_arrivals`.
    """
    names = tuple(place.name for place in _places_in(parent))
    return () if any(_version_of(each, name) is not None for each in names) else names


def to_publish(arrivals: Sequence[Arrival], *, newest_only: bool) -> tuple[Arrival, ...]:
    """Order what is to be published: complete versions, oldest first, then those that are not."""
    complete = [one for one in arrivals if not one.waits_for]
    waiting = [one for one in arrivals if one.waits_for]
    return (*(complete[-1:] if newest_only else complete), *waiting)


def _places_in(parent: Path | RemotePlace) -> list[Path | RemotePlace]:
    """Name what may be directories, in the order of their names."""
    if not isinstance(parent, Path):
        return [parent.below(name) for name in sorted(parent.look().directories)]
    try:
        return [parent / name for name in sorted(entry.name for entry in parent.iterdir())]
    except OSError as error:
        refuse_unreadable(str(parent), error)


def _what_is_missing(
    place: Path | RemotePlace, marker: str | None, still_seconds: float, now: float
) -> str | None:
    """Say what a version waits for, if anything; None where the place is no directory."""
    try:
        if isinstance(place, Path) and not S_ISDIR(place.stat().st_mode):
            return None
        directory = place if isinstance(place, Path) else place.look()
        files = _written(directory)
        if marker is not None:
            return "" if marker in files else marker
        shards = {file for file in files if file.endswith(SHARD_SUFFIX)}
        shards |= _named_in(directory) if INDEX_FILE in files else _numbered_beside(shards)
        for shard in sorted(shards):
            with open_shard(directory / shard):
                pass  # its header says how long it is
    except InvalidCheckpointError as error:
        return str(error.findings[0])
    except StoreUnavailableError:
        raise
    except FileNotFoundError:
        return None  # it vanished
    except OSError as error:
        return f"a directory that can be read: {error.strerror}"
    if not shards:
        return f"a {SHARD_SUFFIX} file"
    age = now - max(files.values())
    return "" if age >= still_seconds else f"{still_seconds:g} s without a write"


def _written(directory: Directory) -> dict[str, float]:
    """When each file of a directory was written, in seconds since the epoch."""
    if isinstance(directory, Path):
        paths = [path for path in directory.iterdir() if path.is_file()]
        return {path.name: path.stat().st_mtime for path in paths}
    return {name: file.modified_at for name, file in directory.files.items()}


def _named_in(directory: Directory) -> set[str]:
    document = read_json_object(read_document(directory / INDEX_FILE), file=INDEX_FILE)
    weight_map = document.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for reason in filter(None, map(name_obstacle, names)):
        refuse_file("file_name", INDEX_FILE, reason, "plain file names")
    return {*names}


def _numbered_beside(shards: set[str]) -> set[str]:
    """Name the shards that are to come, where a name says `-00001-of-00004`; an index names them
    only at the end.
    """
    named = set()
    for shard in shards:
        if numbered := re.fullmatch(r"(.*-)([0-9]{5})(-of-)([0-9]{5})(\.safetensors)", shard):
            start, _, middle, count, end = numbered.groups()
            named |= {f"{start}{n:05d}{middle}{count}{end}" for n in range(1, int(count) + 1)}
    return named
