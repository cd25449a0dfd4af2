"""What a node answers, and what it leaves to another one."""

from pathlib import Path
from typing import NoReturn

import pytest

from hotload.clients.nodes import NodeAnswer
from hotload.directory.files import refuse_file, sha256_file
from hotload.directory.relayout import view_checkpoint
from hotload.errors import BaselineLostError, InvalidCheckpointError
from tasks.nodes import answer_of


async def fail(error: Exception) -> NoReturn:
    raise error


async def look_at(place: Path) -> NodeAnswer:
    view_checkpoint(place)
    return NodeAnswer()


async def read(file: Path) -> NodeAnswer:
    sha256_file(file)
    return NodeAnswer()


@pytest.mark.parametrize("harm", ["no mount", "a file in its place", "no shard", "no right"])
async def test_a_node_that_does_not_see_the_checkpoint_fails_and_blames_nobody(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "000012"
    if harm == "a file in its place":
        place.touch()
    elif harm == "no right":
        place.mkdir()
        monkeypatch.setattr("os.scandir", _refuse)
    step = read(place / "a.safetensors") if harm == "no shard" else look_at(place)
    with pytest.raises(InvalidCheckpointError):
        await answer_of(step)


def _refuse(path: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


async def test_what_every_node_would_meet_is_an_answer() -> None:
    lost = await answer_of(fail(BaselineLostError("run-000011-00000000", "gone")))
    assert "run-000011-00000000" in str(lost.needs_full)
    with pytest.raises(InvalidCheckpointError) as changed:
        refuse_file("changed_while_read", "a", "other bytes", "as validated")
    answer = await answer_of(fail(changed.value))
    assert answer.findings == changed.value.findings
