"""A service that costs next to nothing: canned answers, streamed, from one plain socket protocol.

Every answer is the same stream of one event per token, in the form of protocol §12, written a few
events at a time over the answer's latency. `--slow-at` begins a bad time: ten times the latency,
and every fifth request refused with 429. `GET` anything tells how many requests came, as JSON.
"""

import argparse
import asyncio
import json
import time

TOKEN_IDS = range(5, 16)
PROMPT = list(range(100, 132))
MODEL = "accounts/bench/models/tiny@bench-000001-00000000"
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"x-request-id: r-bench\r\n\r\n"
)
REFUSAL = b'{"error": {"code": "RATE_LIMIT", "message": "too many", "type": "rate"}}'
SLOWER, REFUSED_ONE_IN = 10, 5


def events(token_count: int, queue_seconds: float) -> list[bytes]:
    """The server-sent events of one answer."""
    ids = [TOKEN_IDS[i % len(TOKEN_IDS)] for i in range(token_count)]
    made = []
    for number, token in enumerate(ids):
        entry = {
            "token": f" t{token}",
            "bytes": list(f" t{token}".encode()),
            "token_id": token,
            "logprob": -0.5 - number / 997,
            "sampling_logprob": -0.5 - number / 997,
            "text_offset": 3 * number,
            "top_logprobs": [],
        }
        is_last = number == token_count - 1
        choice = {
            "index": 0,
            "text": f" t{token}",
            "logprobs": {"content": [entry]},
            "finish_reason": "length" if is_last else None,
        }
        chunk = {
            "id": "cmpl-bench",
            "object": "text_completion",
            "created": 1767225600,
            "model": MODEL,
            "choices": [choice],
        }
        if is_last:
            choice["raw_output"] = {"prompt_token_ids": PROMPT, "completion_token_ids": ids}
            chunk["usage"] = {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": token_count,
                "total_tokens": len(PROMPT) + token_count,
                "prompt_tokens_details": {"cached_tokens": 16},
            }
            chunk["perf_metrics"] = {"prefill-queue-duration": queue_seconds, "backend-host": "h"}
        made.append(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")
    made[-1] += b"data: [DONE]\n\n"
    return made


def writes(options: argparse.Namespace, queue_seconds: float) -> list[bytes]:
    """What is written at once, as chunks of HTTP; the head goes before the first."""
    found = events(options.tokens, queue_seconds)
    step = options.events_per_write
    pieces = [b"".join(found[i : i + step]) for i in range(0, len(found), step)]
    framed = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    framed[0] = HEAD + framed[0]
    framed[-1] += b"0\r\n\r\n"
    return framed


class Service:
    """What all connections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.good = writes(options, 0.01)
        self.bad = writes(options, 0.01 * SLOWER)
        self.latency = options.latency
        self.slow_from, self.slow_for = options.slow_at, options.slow_for
        self.first_at: float | None = None
        self.requests = self.refused = self.busy = 0

    def is_bad(self) -> bool:
        """Whether the bad time is now."""
        if self.slow_from is None or self.first_at is None:
            return False
        return self.slow_from <= time.monotonic() - self.first_at < self.slow_from + self.slow_for


class Connection(asyncio.Protocol):
    """One keep-alive connection; a request at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self.data = b""
            self.tell()
            return
        name = head.lower().index(b"content-length:") + 15
        length = int(head[name : name + 20].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self.data = body[length:]
            self.answer()

    def tell(self) -> None:
        service = self.service
        body = json.dumps({"requests": service.requests, "refused": service.refused}).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    def answer(self) -> None:
        service = self.service
        service.first_at = service.first_at or time.monotonic()
        service.requests += 1
        is_bad = service.is_bad()
        if is_bad and service.requests % REFUSED_ONE_IN == 0:
            service.refused += 1
            self.transport.write(
                b"HTTP/1.1 429 X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(REFUSAL), REFUSAL)
            )
            return
        pieces = service.bad if is_bad else service.good
        wait = service.latency * (SLOWER if is_bad else 1) / len(pieces)
        loop = asyncio.get_running_loop()

        def write(number: int) -> None:
            if self.transport.is_closing():
                return
            self.transport.write(pieces[number])
            if number + 1 < len(pieces):
                loop.call_later(wait, write, number + 1)

        loop.call_later(wait, write, 0)


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process ends."""
    service = Service(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", options.port)
    await server.serve_forever()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of one answer")
    parser.add_argument("--events-per-write", type=int, default=8)
    parser.add_argument("--slow-at", type=float, help="seconds after the first request")
    parser.add_argument("--slow-for", type=float, default=10.0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
