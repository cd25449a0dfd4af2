"""`hotload store`: what lies in a store that two replicas load from, and a person's word on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hotload.__main__ import _main, main
from hotload.clients.store import publisher_lease
from hotload.publish.chain import plan_full
from tests.flows.fleet import API_KEY, NAMES, SERVICE
from tests.tasks.publishing import Publisher, flip_a_byte

Command = Callable[..., Awaitable[tuple[int, dict[str, Any]]]]


@pytest.fixture
def service(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> str:
    """The service as an argument; its key and address are in the environment."""
    monkeypatch.setenv("FIREWORKS_API_KEY", API_KEY)
    monkeypatch.setenv("FIREWORKS_BASE_URL", publisher.fleet.url)
    return "/".join(NAMES.values())


@pytest.fixture
def store(publisher: Publisher, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command on the publisher's bucket in a thread; its exit code and its facts."""

    async def run(verb: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        line = ["store", verb, publisher.store.url, *arguments, "--json"]
        capsys.readouterr()
        # The thread that runs the test's loop is the only one that may handle signals.
        code = await asyncio.to_thread(_main, line)
        return code, json.loads(capsys.readouterr().out)

    return run


async def published(publisher: Publisher, count: int) -> list[str]:
    """Versions from 1 on: a full, and deltas on it; the replicas serve the last."""
    return [(await publisher.publish(version)).identity for version in range(1, count + 1)]


async def test_list_says_what_lies_there_and_who_serves_it(
    publisher: Publisher, service: str, store: Command
) -> None:
    first, second = await published(publisher, 2)
    await store("pin", first)
    code, facts = await store("list", "--service", service)
    assert (code, facts["command"]) == (0, "store list")
    rows = {one["identity"]: one for one in facts["snapshots"]}
    assert [*rows] == [first, second]
    assert (rows[first]["kind"], rows[first]["pinned"], rows[first]["served_by"]) == (
        "full",
        True,
        [],
    )
    assert (rows[second]["kind"], rows[second]["needs"]) == ("delta", [first])
    assert rows[second]["served_by"] == ["local/rollouts"]
    assert facts["size_bytes"] == sum(one["size_bytes"] for one in facts["snapshots"])
    _, without = await store("list")
    assert not any(one["served_by"] for one in without["snapshots"])


async def test_show_says_what_a_late_joiner_loads_and_what_a_broken_chain_lacks(
    publisher: Publisher, service: str, store: Command
) -> None:
    first, second, third = await published(publisher, 3)
    code, facts = await store("show", second, "--service", service)
    assert code == 0
    assert [one["identity"] for one in facts["chain"]] == [first, second]
    assert [one["identity"] for one in facts["followers"]] == [third]
    assert facts["replay_bytes"] == sum(one["size_bytes"] for one in facts["chain"])
    (publisher.fleet.bucket / f"_hotload/snapshots/{first}.json").unlink()
    code, facts = await store("show", third)
    assert (code, facts["missing"]) == (1, [first])
    (publisher.fleet.bucket / f"_hotload/snapshots/{second}.json").write_text("{")
    code, facts = await store("show", third)
    assert (code, [one["manifest"] for one in facts["chain"]]) == (1, ["unreadable", "read"])
    code, facts = await store("show", "run-000099-00000000")
    assert code == 2
    assert "no such snapshot" in facts["error"]["message"]


async def test_verify_names_what_is_not_as_it_was_published(
    publisher: Publisher, store: Command
) -> None:
    first, second = await published(publisher, 2)
    code, facts = await store("verify")
    assert (code, facts["snapshot_count"], facts["findings"]) == (0, 2, [])
    damaged = next(iter(sorted((publisher.fleet.bucket / second).glob("*.safetensors"))))
    flip_a_byte(damaged)
    code, facts = await store("verify")
    assert code == 1
    (finding,) = facts["findings"]
    assert (finding["rule"], finding["file"]) == ("object_digest", f"{second}/{damaged.name}")
    code, facts = await store("verify", first)
    assert (code, facts["snapshot_count"]) == (0, 1)
    (publisher.fleet.bucket / f"_hotload/snapshots/{first}.json").write_text("{")
    code, facts = await store("verify", first)
    assert (code, facts["findings"][0]["rule"]) == (1, "manifest")


async def test_delete_refuses_what_is_served_needed_pinned_or_under_a_publisher(
    publisher: Publisher, service: str, store: Command
) -> None:
    first, second = await published(publisher, 2)
    doubtful = await publisher.carry(3, await publisher.plan(3))  # a delta on what is served
    content = publisher.content(4)
    plan = plan_full(content, "extra", run_id="run", policy_version=4)
    extra = await publisher.carry(4, plan)  # never signalled

    async def refusal(identity: str, *more: str) -> str:
        code, facts = await store("delete", identity, "--service", service, *more)
        assert code in (2, 3)
        return str(facts["error"]["message"])

    assert "served by local/rollouts" in await refusal(second)
    assert f"needed by {second}" in await refusal(first)
    assert "must not be sent twice" in await refusal(doubtful.identity)
    await store("pin", extra.identity)
    assert "unpin it first" in await refusal(extra.identity)
    await store("unpin", extra.identity)
    async with publisher_lease(publisher.store, SERVICE, "run-000009"):
        assert "held by 'run-000009'" in await refusal(extra.identity)
    other = f"{service}@http://127.0.0.1:9"
    assert "what it serves is unknown" in await refusal(extra.identity, "--service", other)
    code, facts = await store("delete", extra.identity, "--service", service)
    assert (code, facts["removed"]) == (0, extra.identity)
    assert not (publisher.fleet.bucket / extra.identity).exists()
    assert (await store("verify"))[1]["snapshot_count"] == 3


async def test_a_service_of_another_store_and_one_without_replicas_say_too_little(
    publisher: Publisher,
    service: str,
    store: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await published(publisher, 1)
    publisher.fleet.fault(fault="empty_replicas")
    code, facts = await store("list", "--service", service)
    assert code == 3
    assert "lists no replica" in facts["error"]["message"]
    (tmp_path / "other").mkdir()
    line = ["store", "list", str(tmp_path / "other"), "--service", service, "--json"]
    assert await asyncio.to_thread(_main, line) == 3
    assert "the service reads" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["delete", "/nowhere", "run-000001-00000000"],
        ["delete", "/nowhere", "run-000001-00000000", "--service", "acme/rollouts"],
        ["list", "ftp://nowhere"],
        ["list", "/nowhere", "--service", "a/b/c@ftp://x"],
        ["show", "/nowhere"],
        [],
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["store", *arguments])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code in (2, 3)
    assert capsys.readouterr().err.startswith("hotload store")
