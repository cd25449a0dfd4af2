"""`hotload service`: what two replicas do and why, their ledger, and a reset of it."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hotload.__main__ import _main, main
from hotload.clients.store import publisher_lease
from tests.flows.fleet import API_KEY, NAMES, SERVICE, running_fleet
from tests.tasks.publishing import Publisher
from tests.waiting import until

Command = Callable[..., Awaitable[tuple[int, dict[str, Any]]]]
DOOR = "/".join(NAMES.values())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `hotload service …` in a thread; its exit code and its facts."""
    monkeypatch.setenv("FIREWORKS_API_KEY", API_KEY)

    async def command(verb: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        # The thread that runs the test's loop is the only one that may handle signals.
        code = await asyncio.to_thread(_main, ["service", verb, *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return command


def cycle_file(publisher: Publisher, **blocks: Any) -> str:
    """A cycle file with its own blocks; `blocks` replace them."""
    account = {"base_url": publisher.fleet.url, **NAMES}
    declared = {"account": account, "store": {"url": publisher.store.url}, **blocks}
    path = publisher.work / "cycle.yaml"
    path.parent.mkdir(exist_ok=True)
    document = {"blocks": declared, "cycle": publisher.fleet.declared(1)}
    path.write_text(yaml.safe_dump(document))
    return str(path)


async def test_status_says_who_serves_what_and_that_nothing_is_to_be_done(
    publisher: Publisher, run: Command
) -> None:
    first, second = [(await publisher.publish(version)).identity for version in (1, 2)]
    code, facts = await run("status", "--cycle", cycle_file(publisher))
    assert (code, facts["command"], facts["has_ledger"]) == (0, "service status", True)
    (words,) = {one["words"] for one in facts["replicas"]}
    assert (len(facts["replicas"]), words) == (2, f"on {second}, ready")
    told = facts["explanation"]
    assert told["seen"] == [
        f"2 of 2 replicas hold {second}, which follows {first}; 1 delta since {first}"
    ]
    assert told["next_step"].startswith("nothing to do")
    named = f"{DOOR}@{publisher.fleet.url}"
    code, facts = await run("status", "--service", named)
    assert (code, "explanation" in facts) == (0, False)


async def test_status_explains_a_failed_delta_and_a_lease(
    publisher: Publisher, run: Command
) -> None:
    first = await publisher.publish(1)
    publisher.fleet.fault(fault="corrupt_object", count=1)
    failed = await publisher.carry(2, await publisher.plan(2))
    await publisher.signal(failed)
    file = cycle_file(publisher)

    async def has_failed() -> bool:
        return bool((await publisher.service.observe()).failed(failed.identity))

    await until(has_failed)
    code, facts = await run("status", "--cycle", file)
    words = [one["words"] for one in facts["replicas"]]
    assert f"on {first.identity}, ready, error for {failed.identity}" in words
    assert any("error" in one["as_shown"] for one in facts["replicas"])
    assert API_KEY not in json.dumps(facts)
    assert code == 0
    told = facts["explanation"]
    assert f"a load of {failed.identity} failed" in told["seen"][1]
    async with publisher_lease(publisher.store, SERVICE, "run-000009"):
        code, facts = await run("status", "--cycle", file)
    assert "a lease is held by 'run-000009' until " in facts["explanation"]["seen"][-1]


async def test_agents_without_a_door_are_not_taken_for_the_vendor(
    publisher: Publisher, run: Command
) -> None:
    file = cycle_file(publisher, service={"agents": ["http://127.0.0.1:8700"]})
    code, facts = await run("status", "--cycle", file)
    assert (code, "agents without a door" in facts["error"]["message"]) == (2, True)


async def test_the_ledger_is_read_and_reset_once_it_is_confirmed(
    publisher: Publisher, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [(await publisher.publish(version)).identity for version in (1, 2)]
    file = cycle_file(publisher)
    code, facts = await run("ledger", "--cycle", file)
    shown = [(one["identity"], one["kind"]) for one in facts["entries"]]
    assert (code, shown) == (0, [(second, "delta"), (first, "full")])

    for typed in ("", "yes\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code, facts = await run("reset", "--cycle", file)
        assert code == 2
        assert "nothing was reset" in facts["error"]["message"]
    async with publisher_lease(publisher.store, SERVICE, "run-000009"):
        code, facts = await run("reset", "--cycle", file, "--yes")
    assert (code, publisher.fleet.served()) == (3, {second})
    assert "held by 'run-000009'" in facts["error"]["message"]

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{NAMES['deployment_id']}\n"))
    code, facts = await run("reset", "--cycle", file)
    assert (code, facts["served_before"]) == (0, f"{second} on 2")
    assert publisher.fleet.served() == {None}
    assert (await run("ledger", "--cycle", file))[1]["entries"] == []
    code, facts = await run("status", "--cycle", file)
    assert (code, facts["explanation"]["needs_person"]) == (1, True)
    assert (await publisher.publish(3)).previous is None


async def test_a_service_that_shows_no_ledger_says_what_does(
    publisher: Publisher, run: Command
) -> None:
    named = f"{DOOR}@{publisher.fleet.url}"
    publisher.respond("ledger", 405, count=1)
    code, facts = await run("ledger", "--service", named)
    assert (code, "`firectl get ledger rollouts`" in facts["error"]["message"]) == (3, True)
    publisher.respond("ledger", 200, body='{"entries": 3}', count=1)
    code, facts = await run("ledger", "--service", named)
    assert (code, "expected a list" in facts["error"]["message"]) == (3, True)


@pytest.mark.server
async def test_a_plain_door_is_named_by_every_command_and_has_no_ledger(
    tmp_path: Path, checkpoints: list[Path], run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_fleet("plain", tmp_path, checkpoints, dialect="plain") as fleet:
        named = f"plain:{DOOR}@{fleet.url}"
        code, facts = await run("status", "--service", named, "--store", fleet.bucket.as_uri())
        assert (code, facts["has_ledger"]) == (0, False)
        assert [one["words"] for one in facts["replicas"]] == ["on base weights, ready"] * 2
        code, facts = await run("ledger", "--service", named)
        assert (code, facts["entries"]) == (0, None)
        code, facts = await run("reset", "--service", named, "--yes")
        assert (code, "has no ledger" in facts["error"]["message"]) == (2, True)
        capsys.readouterr()
        line = ["store", "list", str(fleet.bucket), "--service", named, "--json"]
        assert await asyncio.to_thread(_main, line) == 0
        wrong = f"fireworks:{DOOR}@{fleet.url}"
        assert (await run("status", "--service", wrong))[0] == 3


@pytest.mark.parametrize(
    ("dialect", "code", "told"),
    [("plain", 3, "compare base_url"), ("fireworks", 2, "more than a name of this dialect")],
)
def test_a_model_may_be_more_than_a_name_where_a_block_lets_it(
    dialect: str,
    code: int,
    told: str,
    tmp_path: Path,
    run: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nobody = "http://127.0.0.1:1"
    names = {"account_id": "acme", "model_id": "Qwen/Qwen3-8B", "deployment_id": "rollouts"}
    file = tmp_path / "cycle.yaml"
    account = {**names, "dialect": dialect, "base_url": nobody}
    file.write_text(yaml.safe_dump({"cycle": {}, "blocks": {"account": account}}))
    named = f"{dialect}:{'/'.join(names.values())}@{nobody}"
    for arguments in (["--cycle", str(file)], ["--service", named]):
        found = _main(["service", "status", *arguments])
        assert (found, told in capsys.readouterr().err) == (code, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["status"], "one of the arguments --service --cycle is required"),
        (["status", "--service", "a/b"], "expected [DIALECT:]ACCOUNT"),
        (["status", "--service", "odd:a/b/c"], "found dialect 'odd', expected fireworks or plain"),
        (["status", "--service", "a/b/c", "--store", "ftp://x"], "the URL of the store"),
        (["ledger", "--cycle", "nothing.yaml"], "found nothing at 'nothing.yaml'"),
        (["reset", "--service", "a/b/c", "--cycle", "pyproject.toml"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["service", *arguments])
    except SystemExit as ended:
        code = int(str(ended.code))
    error = capsys.readouterr().err
    assert (code, error[:16]) == (2, "hotload service ")
    assert told in error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cycle: [", "is not YAML"),
        ("cycle: {service: prod}", "the service 'prod', expected one in the file, or --service"),
        (
            "cycle: {}\nblocks: {account: {api_kei: hush}}",
            "found ['api_kei'], expected texts",
        ),
        ("cycle: {}\nblocks: {account: {api_key: [hush]}}", "found ['api_key'], expected texts"),
        (
            "cycle: {}\nblocks: {account: {account_id: a, model_id: b}}",
            "found deployment_id",
        ),
        (
            "cycle: {}\nblocks: {account: {account_id: a, model_id: b, deployment_id: c,"
            " base_url: 'http://me:hush@x'}}",
            "without credentials",
        ),
        (
            "cycle: {}\nblocks: {account: {account_id: a, model_id: b, deployment_id: c},"
            " store: {url: 'ftp://x'}}",
            "blocks.store",
        ),
        (
            "cycle: {}\nblocks: {account: {account_id: a, model_id: b, deployment_id: c},"
            " store: {url: /x, options: hush}}",
            "blocks.store",
        ),
    ],
)
def test_a_cycle_file_that_is_wrong_is_refused_and_shows_no_value(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cycle.yaml"
    file.write_text(text)
    assert main(["service", "status", "--cycle", str(file)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "hush" not in error
