"""A stand-in for the service: every completion after a fixed latency, one event per token."""

import argparse
import asyncio
import json

MODEL = "accounts/local/models/policy@bench-000001-00000000"


def answer(token_count: int) -> bytes:
    events = []
    for i in range(token_count):
        entry = {
            "token": "ab",
            "bytes": [97, 98],
            "token_id": 100 + i,
            "logprob": -0.25,
            "sampling_logprob": -0.25,
            "text_offset": 2 * i,
            "top_logprobs": [],
        }
        choice = {"index": 0, "text": "ab", "logprobs": {"content": [entry]}, "finish_reason": None}
        events.append({"id": "x", "object": "c", "created": 0, "model": MODEL, "choices": [choice]})
    raw = {
        "completion_token_ids": [100 + i for i in range(token_count)],
        "prompt_token_ids": [1, 2],
    }
    end = {"index": 0, "text": "", "finish_reason": "length", "raw_output": raw}
    usage = {"prompt_tokens": 2, "completion_tokens": token_count, "total_tokens": token_count + 2}
    events.append(
        {
            "model": MODEL,
            "choices": [end],
            "usage": usage,
            "perf_metrics": {"prefill-queue-duration": 0.01},
        }
    )
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    body += b"data: [DONE]\n\n"
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    pieces = [body[i : i + 4096] for i in range(0, len(body), 4096)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + chunks + b"0\r\n\r\n"


async def serve(port: int, latency: float, token_count: int) -> None:
    reply = answer(token_count)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(size)
                await asyncio.sleep(latency)
                writer.write(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    asyncio.run(serve(given.port, given.latency, given.tokens))
