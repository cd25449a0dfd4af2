"""A cycle that the service refuses names block and remedy, as the check of the block does."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from blocks.__main__ import main
from blocks.account import InferenceAccount
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from flows.cycle import checkpoint_to_rollout
from flows.plan import preview_publication
from flows.publish import publish_version
from flows.rollback import roll_back
from hotload.errors import ServiceRefusedError
from hotload.spec import CycleSpec
from tests.flows.fleet import API_KEY, NAMES, Fleet

WRONG_KEY = "another-key-that-must-not-be-shown"


def account(fleet: Fleet, **changes: str) -> InferenceAccount:
    return InferenceAccount(**{"base_url": fleet.url, "api_key": API_KEY, **NAMES, **changes})


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"api_key": WRONG_KEY}, "use a key of this account"),
        ({"deployment_id": "elsewhere"}, "compare account, model and deployment"),
    ],
)
async def test_a_service_that_refuses(
    fleet: Fleet, changes: dict[str, str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service = HotLoadService(account=account(fleet, **changes))
    await service.save(fleet.name, overwrite=True)
    with pytest.raises(ServiceRefusedError) as caught:
        await checkpoint_to_rollout(fleet.spec(1))
    text = str(caught.value)
    assert text.count(f"For block hot-load-service/{fleet.name}: {remedy}") == 1
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["check", "service", fleet.name]) == 1
    assert text.partition(". For ")[2] in capsys.readouterr().out
    assert WRONG_KEY not in text


def nothing_was_published(fleet: Fleet) -> bool:
    snapshots = [path for path in fleet.bucket.iterdir() if path.name != "_hotload"]
    return not snapshots and not fleet.log()["signals"]


@pytest.mark.parametrize(
    "changes", [{"deployment_id": "elsewhere"}, {"model_id": "typo"}, {"dialect": "plain"}]
)
@pytest.mark.parametrize("does", [checkpoint_to_rollout, preview_publication])
async def test_a_rollouts_block_that_is_answered_404(
    fleet: Fleet, changes: dict[str, str], does: Callable[[CycleSpec], Awaitable[object]]
) -> None:
    """Before its first snapshot too; a cycle of one that is right then goes through."""
    await RolloutClient(account=account(fleet, **changes)).save(fleet.name, overwrite=True)
    with pytest.raises(ServiceRefusedError, match="HTTP 404") as caught:
        await does(fleet.spec(1))
    assert f"For block rollout-client/{fleet.name}: compare account, model" in str(caught.value)
    assert nothing_was_published(fleet)
    await RolloutClient(account=account(fleet)).save(fleet.name, overwrite=True)
    await does(fleet.spec(1))


async def test_a_version_that_nothing_is_sampled_from_is_published(fleet: Fleet) -> None:
    await checkpoint_to_rollout(fleet.spec(1))
    await RolloutClient(account=account(fleet, model_id="typo")).save(fleet.name, overwrite=True)
    await publish_version(fleet.spec(2))
    await roll_back(fleet.spec(2), "1")


async def test_a_rollouts_block_that_is_refused(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = RolloutClient(account=account(fleet, api_key=WRONG_KEY))
    await rollouts.save(fleet.name, overwrite=True)
    with pytest.raises(ServiceRefusedError) as caught:
        await checkpoint_to_rollout(fleet.spec(1))
    text = str(caught.value)
    assert text.count(f"For block rollout-client/{fleet.name}: use a key of this account") == 1
    assert nothing_was_published(fleet)
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["check", "rollouts", fleet.name]) == 1
    assert text.partition(". For ")[2] in capsys.readouterr().out
    assert WRONG_KEY not in text
