"""The placement benchmark's client: what it counts and what it parses, however the bytes of an answer are cut."""

import asyncio
import json

import pytest

from bench.placement.client import Client, Reply

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TRICKY = 'a text with data: {"error"} and\n\ndata: {"prompt_tokens"} in it'


def chunk(event: object) -> bytes:
    body = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(body), body)


def text(of: str, *ids: int) -> bytes:
    return chunk({"choices": [{"index": 0, "text": of, **({"token_ids": ids} if ids else {})}]})


USAGE = chunk({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


async def asked(answer: bytes, piece: int, *, ids: bool, wanted: int = 3) -> Reply:
    """What the client makes of an answer that comes in pieces of so many bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        for at in range(0, len(answer), piece):
            writer.write(answer[at : at + piece])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await Client(f"http://127.0.0.1:{port}", "model").ask("words", wanted, ids=ids)


@pytest.mark.parametrize("piece", [1, 5, 64, 10_000])
async def test_events_are_counted_wherever_the_answer_is_cut(piece: int) -> None:
    reply = await asked(HEAD + text("one") + text(TRICKY) + text("three") + USAGE, piece, ids=False)
    assert (reply.answer.fault, reply.answer.num_input, reply.answer.num_seen) == (None, 7, 3)


@pytest.mark.parametrize("piece", [1, 10_000])
async def test_tokens_are_read_where_they_are_asked_for(piece: int) -> None:
    reply = await asked(HEAD + text("one", 5) + text(TRICKY, 6, 7) + USAGE, piece, ids=True)
    assert (reply.token_ids, [number for _, number in reply.answer.arrivals]) == ((5, 6, 7), [1, 2])


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (HEAD + text("one") + chunk({"error": {"message": "no worker"}}), "no worker"),
        (HEAD + text("one"), "None tokens came, not 3"),
        (HEAD + b'9\r\ndata: {"error"\n\n\r\n', "JSONDecodeError"),
        (b"", "None tokens came, not 3"),
    ],
)
async def test_what_went_wrong_is_noted(answer: bytes, fault: str) -> None:
    assert fault in str((await asked(answer, 10_000, ids=False)).answer.fault)
