"""Many requests at once, loads underneath them: nothing blocks, nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.waiting import PATIENCE_SECONDS

Start = Callable[..., Any]


async def test_sixty_four_at_once_while_the_weights_change(start: Start, publisher: Any) -> None:
    caller = start(replica_count=3)
    publisher.full("a")
    for number in range(3):
        publisher.delta(f"b{number}", "a" if number == 0 else f"b{number - 1}", seed=number)
    await asyncio.to_thread(caller.load, "a")
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(
        base_url=caller.running.url,
        headers=caller.http.headers,
        limits=limits,
        timeout=PATIENCE_SECONDS,
    ) as http:

        async def ask(number: int) -> list[str]:
            body = {
                "model": caller.config.model,
                "prompt": [number % 50, 1, 2],
                "max_tokens": 24,
                "stream": True,
                "logprobs": True,
                "ignore_eos": True,
            }
            answer = await http.post("/inference/v1/completions", json=body)
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            count = sum(len(c["logprobs"]["content"]) for chunk in chunks for c in chunk["choices"])
            assert count == 24
            return [chunk["model"].partition("@")[2] for chunk in chunks]

        async def publish() -> None:
            previous = "a"
            for number in range(3):
                await asyncio.to_thread(caller.load, f"b{number}", previous)
                previous = f"b{number}"

        *answers, _ = await asyncio.gather(*(ask(number) for number in range(64)), publish())
    order = ["a", "b0", "b1", "b2"]
    for identities in answers:
        places = [order.index(identity) for identity in identities]
        assert places == sorted(places)  # never back to older weights
    assert caller.served() == ["b2"] * 3
    chain = [(identity, "applied") for identity in order]
    assert caller.applied() == {f"replica-{i}": chain for i in range(3)}


async def test_the_status_answers_while_everything_computes(start: Start) -> None:
    caller = start(replica_count=1)
    headers = caller.http.headers
    async with httpx.AsyncClient(
        base_url=caller.running.url, headers=headers, timeout=PATIENCE_SECONDS
    ) as http:
        body = {"model": caller.config.model, "prompt": [1] * 60, "max_tokens": 60}
        path = "/inference/v1/completions"
        asked = [asyncio.create_task(http.post(path, json=body)) for _ in range(32)]
        seen = 0
        while not all(task.done() for task in asked):
            answer = await http.get("/hot_load/v1/models/hot_load")
            assert answer.status_code == 200
            seen += 1
        assert {task.result().status_code for task in asked} == {200}
        assert seen > 3
