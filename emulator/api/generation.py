"""One request on one replica: admitted, prefilled, continued across swaps (protocol §9)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from agent.failures import RefusedError
from emulator.api.inference_request import InferenceRequest
from emulator.engine.engine import Choice, Prompt, Token
from emulator.engine.tokens import TextStream, Tokens
from emulator.replicas.replica import Replica
from emulator.replicas.service import Service

BURST_TOKENS = 8  # computed without looking at anything else
CANNED_BURST_TOKENS = 64


@dataclass(slots=True)
class Piece:
    """What one choice got in one burst, all of it from the weights of `served`."""

    index: int
    tokens: list[Token]
    text: str
    offsets: list[int]
    served: str | None
    finish_reason: str | None = None
    echoed: list[Token] = field(default_factory=list)
    prompt: list[int] | None = None


class GeneratedAnswer:
    """One choice under way: its text, its stops, its end."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        choice: Choice,
        request: InferenceRequest,
        tokens: Tokens,
    ) -> None:
        self.index, self.prompt, self.choice = index, prompt, choice
        self.token_ids: list[int] = []
        self.is_done = False
        self._request, self._stream = request, TextStream(tokens)
        self._held = ""
        self._length = 0

    def take(self, tokens: list[Token], served: str | None) -> Piece:
        """Take the next piece, cut at the first stop id, stop text, or the last token allowed."""
        piece = Piece(self.index, [], "", [], served)
        for token in tokens:
            piece.tokens.append(token)
            piece.offsets.append(self._length + len(self._held) + len(piece.text))
            self.token_ids.append(token.id)
            is_last = len(self.token_ids) == self._request.max_tokens
            text = ""
            if token.id in self._request.stop_ids:
                piece.finish_reason = "stop"
            else:
                text = self._stream.add(token.id)
                if is_last:
                    piece.finish_reason = "length"
                    text += self._stream.rest()
            piece.text += self._release(text, piece) if self._request.stop else text
            if piece.finish_reason is not None:
                break
        self.is_done = piece.finish_reason is not None
        self._length += len(piece.text)
        return piece

    def _release(self, text: str, piece: Piece) -> str:
        """Give out what came before and `text`, up to a stop text, which ends the piece; what may
        be the beginning of one is held back.
        """
        text = self._held + text
        found = [at for stop in self._request.stop if (at := text.find(stop)) >= 0]
        if found:
            piece.finish_reason, self._held = "stop", ""
            return text[: min(found)]
        keep = 0
        if piece.finish_reason is None:
            for stop in self._request.stop:
                sizes = range(1, min(len(stop), len(text) + 1))
                keep = max([keep, *(size for size in sizes if text.endswith(stop[:size]))])
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Generation:
    """Runs a request; afterwards knows its usage, timings and the identities it met."""

    def __init__(
        self,
        service: Service,
        replica: Replica,
        request: InferenceRequest,
        session: str | None,
        adapter: str | None,
    ) -> None:
        self._service, self.replica, self._request = service, replica, request
        self._session, self._adapter = session, adapter
        self.prompt_count = sum(map(len, request.prompts))
        self.cached_count = self.completion_count = 0
        self.identities: list[str | None] = []
        self.queued_seconds = self.prefill_seconds = self.first_seconds = self.total_seconds = 0.0

    async def pieces(self, *, drain_seconds: float, request_id: str) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come.

        Raises:
            RefusedError: 425 while the weights swap, 502 when the replica restarts underneath.
        """
        clock, replica = self._service.clock, self.replica
        self._started_at, self._drain_seconds = time.perf_counter(), drain_seconds
        with clock.busy():
            await self._admit()
            self._life = replica.starts
            replica.in_flight += 1
            try:
                await clock.sleep(self._service.config.latency_seconds)
                async for piece in self._run(self._session or f"request {request_id}"):
                    self.total_seconds = time.perf_counter() - self._started_at
                    self.first_seconds = self.first_seconds or self.total_seconds
                    if piece.served not in self.identities[-1:]:
                        self.identities.append(piece.served)
                    self.completion_count += len(piece.tokens)
                    yield piece
            finally:
                replica.leave()

    async def _run(self, session: str) -> AsyncIterator[Piece]:
        service, request = self._service, self._request
        answers: list[GeneratedAnswer] = []
        for position, ids in enumerate(request.prompts):
            prompt = await self._prefill(ids, session)
            for turn in range(request.n):
                index = position * request.n + turn
                choice = prompt.begin(index, request.stop_ids)
                answer = GeneratedAnswer(index, ids, choice, request, service.tokens)
                answers.append(answer)
                yield self._beginning(answer, prompt)
        waiting = answers if request.max_tokens else []
        pause = service.config.seconds_per_token
        burst = CANNED_BURST_TOKENS if service.around.engine.is_inline else BURST_TOKENS
        while waiting:
            for answer in waiting:
                await service.clock.sleep(pause)
                await self._open()
                served = self.replica.serving(self._adapter)
                left = request.max_tokens - len(answer.token_ids)
                count = 1 if pause else min(burst, left)
                tokens = await self._compute(answer.choice.advance, served.weights, count)
                yield answer.take(tokens, served.identity)
            waiting = [answer for answer in waiting if not answer.is_done]
        self._remember(answers, session)

    async def _prefill(self, ids: list[int], session: str) -> Prompt:
        await self._open()
        started_at = time.perf_counter()
        replica, sampling = self.replica, self._request.sampling
        engine, served = self._service.around.engine, replica.serving(self._adapter)
        self._cached, self._generation = served.prompt_cache, served.prompt_cache.generation
        held, length = served.prompt_cache.find(ids, session)
        echo = self._request.echo_count is not None and self._request.logprobs is not None

        def prefill() -> Prompt:
            cache = held.prefix(length) if held is not None else None
            return engine.prefill(served.weights, ids, sampling, cache, echo=echo)

        prompt = await self._compute(prefill)
        self.cached_count += prompt.cached_count
        if len(ids) > 1:
            served.prompt_cache.put(ids[:-1], prompt.cache, session, self._generation)
        self.prefill_seconds += time.perf_counter() - started_at
        return prompt

    def _beginning(self, answer: GeneratedAnswer, prompt: Prompt) -> Piece:
        """A piece without tokens of its own; with `echo` it carries the prompt's."""
        request = self._request
        served = self.replica.serving(self._adapter).identity
        piece = Piece(answer.index, [], "", [], served, prompt=answer.prompt)
        if request.echo_count is not None:
            echoed = prompt.echoed or [Token(token, 0.0, None) for token in answer.prompt]
            piece.echoed = echoed[max(0, len(echoed) - request.echo_count) :]
            piece.text = self._service.tokens.decode([token.id for token in piece.echoed])
        if not request.max_tokens:
            piece.finish_reason = "length"
        return piece

    def _remember(self, answers: list[GeneratedAnswer], session: str) -> None:
        """Keep the first answer's keys and values for the session's next turn."""
        if not answers or self.replica.starts != self._life or len(self._request.prompts) > 1:
            return
        cache = getattr(answers[0].choice, "cache", None)
        tokens = answers[0].prompt + answers[0].token_ids
        if cache is not None:
            self._cached.put(tokens, cache, session, self._generation)

    async def _admit(self) -> None:
        """Wait for, or be refused by, a replica that swaps its weights."""
        config, gate = self._service.config, self.replica.gate
        if config.transition == "SYNC":
            while not gate.is_set():
                if config.sync_new_requests == "reject":
                    raise RefusedError(425, "hot loading: the replica is swapping its weights")
                with self._service.clock.resting():
                    await gate.wait()
        await self._wait_for_gate()
        if self.replica.is_down:
            raise RefusedError(503, "the replica is restarting")
        self.queued_seconds = time.perf_counter() - self._started_at

    async def _open(self) -> None:
        """Pause while the weights swap; under SYNC a running request goes on with the old ones."""
        if self._service.config.transition == "ASYNC":
            await self._wait_for_gate()
        if self.replica.starts != self._life:
            raise RefusedError(502, "the replica restarted")

    async def _wait_for_gate(self) -> None:
        gate = self.replica.gate
        while not gate.is_set():
            if not await self._service.clock.wait(gate, self._drain_seconds):
                raise RefusedError(425, "hot loading: drain timeout passed")

    async def _compute(self, work: Callable[..., Any], *arguments: Any) -> Any:
        if self._service.around.engine.is_inline:
            return work(*arguments)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._service.compute_threads, work, *arguments)
        except FloatingPointError as error:
            raise RefusedError(500, str(error)) from None
