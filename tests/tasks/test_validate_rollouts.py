"""What is to be sampled is looked at before anything is published."""

import json
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.store import Store
from hotload.errors import HotLoadError, InvalidInputError, InvalidProblemsError, RewardError
from hotload.spec import CycleSpec
from tasks.validate import validate_rollouts
from tests.factories import cycle_spec


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(url=f"file://{tmp_path}/store")


def declared(tmp_path: Path, *rows: dict[str, Any], **fields: Any) -> CycleSpec:
    dataset = tmp_path / "problems.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = {"dataset": str(dataset), **fields.pop("problems", {})}
    return cycle_spec(work_dir=str(tmp_path), problems=problems, **fields)


NUMERIC = {"name": "numeric_answer"}
PARTS = {
    "name": "weighted_sum",
    "arguments": {"parts": [{"name": "length", "arguments": {"target": 5}}, NUMERIC]},
}


@pytest.mark.parametrize("reward", [NUMERIC, PARTS], ids=["alone", "in a sum"])
async def test_answers_that_a_reward_cannot_use(
    tmp_path: Path, store: Store, reward: dict[str, Any]
) -> None:
    rows = [{"prompt": "a", "solution": "4"}, {"id": "b", "prompt": "b", "answer": "a sentence"}]
    with pytest.raises(InvalidProblemsError) as refused:
        await validate_rollouts.fn(declared(tmp_path, *rows, reward=reward), store)
    told = str(refused.value)
    assert "`numeric_answer` cannot use the answers of 2 of 2 rows, in the field `answer`" in told
    assert "row 2 (id 'b'): expected an answer that is one number, found 'a sentence'" in told
    assert "(other fields of the first row: solution)" in told
    with pytest.raises(InvalidProblemsError, match="of 1 of 2 rows, in the field `solution`"):
        await validate_rollouts.fn(
            declared(tmp_path, *rows, reward=reward, problems={"answer_field": "solution"}), store
        )
    good = declared(
        tmp_path, *rows, reward=reward, problems={"answer_field": "solution", "max_rows": 1}
    )
    assert await validate_rollouts.fn(good, store) == 1


async def test_a_cycle_without_problems_samples_nothing(tmp_path: Path, store: Store) -> None:
    spec = cycle_spec(work_dir=str(tmp_path), problems=None)
    told = "`problems` of the cycle: found none; declare them, or only publish"
    with pytest.raises(InvalidProblemsError, match=told):
        await validate_rollouts.fn(spec, store)


async def test_a_reward_of_ones_own_is_not_second_guessed(tmp_path: Path, store: Store) -> None:
    spec = declared(tmp_path, {"prompt": "a"}, reward={"name": "examples.rewards:letters"})
    assert await validate_rollouts.fn(spec, store) == 1


async def test_tools_are_offered_to_chats_alone(tmp_path: Path, store: Store) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = {"messages": [{"role": "user", "content": "a"}], "answer": "1", "tools": tools}
    text = {"prompt": "a", "answer": "1", "tools": tools}
    assert await validate_rollouts.fn(declared(tmp_path, chat), store) == 1
    with pytest.raises(InvalidProblemsError, match="row 2: `tools`: only a chat is offered tools"):
        await validate_rollouts.fn(declared(tmp_path, chat, text), store)
    own = {"rollout": {"name": "examples.rollouts.calculator:rollout"}}
    assert await validate_rollouts.fn(declared(tmp_path, chat, text, sampling=own), store) == 2


@pytest.mark.parametrize(
    ("fields", "kind", "faults"),
    [
        ({"reward": {"name": "nothing"}}, RewardError, 1),
        ({"reward": {"name": "nothing"}, "problems": {"prompt_field": "q"}}, InvalidInputError, 2),
    ],
)
async def test_every_fault_is_told(
    tmp_path: Path, store: Store, fields: dict[str, Any], kind: type[HotLoadError], faults: int
) -> None:
    with pytest.raises(HotLoadError) as refused:
        await validate_rollouts.fn(declared(tmp_path, {"prompt": "a"}, **fields), store)
    assert type(refused.value) is kind
    assert len(str(refused.value).splitlines()) == faults
