"""Links between gateways and hosts on real Unix sockets: order, cancellation, bounds, and what a lost end means."""

from __future__ import annotations

import asyncio
import os
import pickle
import stat
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from coe.errors import CoeError, EngineError, Overloaded
from coe.serve.cluster import link
from coe.serve.cluster.link import Broken, Link, LinkLost, Links, LinkServer
from coe.telemetry.origin import Origin
from coe.types import Chunk, GenerateRequest
from routers.base import Message

ORIGIN = Origin("request-1", "key-1", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
REQUEST = GenerateRequest(messages=(Message("user", "hi"),), origin=ORIGIN)


class OfPlugin(EngineError):
    """An error that pickle writes, and cannot read."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class Host:
    """Answers what the name of the expert says."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled: list[str] = []
        self.sent = 0

    async def answer(self, *asked: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(asked)
        expert = asked[1]
        try:
            if expert == "waits":
                yield Chunk("first")
                await asyncio.Event().wait()
            if expert == "fails":
                raise ZeroDivisionError("a bug")
            if expert == "refuses":
                yield Overloaded("too many")
                return
            if expert == "unreadable":
                yield OfPlugin(7, "a plugin failed")
                return
            if expert == "unpicklable":
                yield lambda: None
                return
            for i in range(2000 if expert == "long" else 3):
                self.sent += 1
                yield Chunk("x" * 10_000 if expert == "long" else f"{expert}{i} ")
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(expert)
            raise


@asynccontextmanager
async def linked(folder: Path, host: Host) -> AsyncIterator[tuple[LinkServer, Link]]:
    server = LinkServer(folder / "own" / "host.sock", host.answer)
    await server.start()
    one = await Link.to(str(server.path))
    try:
        yield server, one
    finally:
        one.end()
        await server.close()
        await until(lambda: not server._links)


async def pieces(one: Link, expert: str) -> list[Any]:
    return [piece async for piece in one.ask(expert, REQUEST, 7, "gateway/1")]


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_many_answers_at_once_each_in_order_and_with_what_was_asked(tmp_path: Path) -> None:
    host = Host()
    async with linked(tmp_path, host) as (_, one):
        answers = await asyncio.gather(*(pieces(one, f"e{i}-") for i in range(50)))
    texts = ["".join(piece.text for piece in answer) for answer in answers]
    assert texts == [f"e{i}-0 e{i}-1 e{i}-2 " for i in range(50)]
    assert host.asked[0] == (True, "e0-", REQUEST, 7, "gateway/1")
    assert host.asked[0][2].origin == ORIGIN, (
        "of which HTTP request and trace it is, which equal requests may not share"
    )


def test_links_work_on_the_event_loop_of_ray_s_processes(tmp_path: Path) -> None:
    """uvloop, whose transports are not those of asyncio."""

    async def over_a_link() -> list[Any]:
        async with linked(tmp_path, Host()) as (_, one):
            long = await pieces(one, "long")
            return [len(long), *await pieces(one, "a")]

    assert uvloop.run(over_a_link()) == [2000, Chunk("a0 "), Chunk("a1 "), Chunk("a2 ")]


async def test_errors_are_pieces_and_a_bug_of_the_host_is_broken(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (_, one):
        (error,) = await pieces(one, "refuses")
        assert isinstance(error, CoeError) and error.code == Overloaded("").code
        assert await pieces(one, "fails") == [Broken("ZeroDivisionError: a bug")]


async def test_a_piece_that_cannot_be_sent_ends_its_own_call_only(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (_, one):
        (broken,), other = await asyncio.gather(pieces(one, "unpicklable"), pieces(one, "a"))
        assert isinstance(broken, Broken) and len(other) == 3


async def test_an_error_that_cannot_be_read_ends_its_own_call_only(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (_, one):
        answer = one.ask("waits", REQUEST, 1, "")
        assert await anext(answer) == Chunk("first")
        assert await pieces(one, "unreadable") == [Broken("OfPlugin: 7: a plugin failed")]
        assert one.is_up and len(await pieces(one, "a")) == 3
        await answer.aclose()


async def test_a_call_that_is_cancelled_before_it_begins_is_forgotten(tmp_path: Path) -> None:
    host = Host()
    async with linked(tmp_path, host) as (server, one):
        one.send((link.ASK, 1, True, "waits", REQUEST, 1, ""))
        one.send((link.CANCEL, 1))  # both arrive in one frame
        assert len(await pieces(one, "a")) == 3
        assert [asked[1] for asked in host.asked] == ["a"]
        (served,) = server._links
        await until(lambda: not served.calls)


async def test_closing_an_answer_cancels_its_call_alone(tmp_path: Path) -> None:
    host = Host()
    async with linked(tmp_path, host) as (_, one):
        async with aclosing(one.ask("waits", REQUEST, 1, "")) as answer:
            assert await anext(answer) == Chunk("first")
        await until(lambda: host.cancelled == ["waits"])
        assert len(await pieces(one, "a")) == 3


async def test_a_gateway_that_is_gone_cancels_its_calls(tmp_path: Path) -> None:
    host = Host()
    async with linked(tmp_path, host) as (_, one):
        answer = one.ask("waits", REQUEST, 1, "")
        await anext(answer)
        one.end()
        await until(lambda: host.cancelled == ["waits"])
        with pytest.raises(LinkLost):
            await anext(answer)


async def test_calls_of_a_host_that_is_gone_are_lost_and_so_are_new_ones(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (server, one):
        answer = one.ask("waits", REQUEST, 1, "")
        assert await anext(answer) == Chunk("first")
        await server.close()
        with pytest.raises(LinkLost):
            await anext(answer)
        assert not one.is_up
        with pytest.raises(LinkLost):
            await pieces(one, "a")


async def test_a_host_that_ends_finishes_its_calls_within_the_grace(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (server, one):
        answer = asyncio.create_task(pieces(one, "a"))
        await asyncio.sleep(0)
        await server.close(5.0)
        assert len(await answer) == 3
        with pytest.raises(OSError):
            await Link.to(str(server.path))


async def test_a_gateway_that_does_not_read_stops_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HIGH_WATER_BYTES", 64 * 1024)
    host = Host()
    async with linked(tmp_path, host) as (_, one):
        assert one._transport is not None
        one._transport.pause_reading()
        answer = asyncio.create_task(pieces(one, "long"))
        await asyncio.sleep(0.5)
        held = host.sent
        assert held < 500, "20 MB are not held in memory"
        await asyncio.sleep(0.1)
        assert host.sent == held
        one._transport.resume_reading()
        assert len(await answer) == 2000


@pytest.mark.parametrize("sent", [struct.pack("!I", 2**32 - 1), struct.pack("!I", 3) + b"abc"])
async def test_a_frame_that_is_too_long_or_damaged_ends_the_connection(tmp_path: Path, sent: bytes) -> None:
    async with linked(tmp_path, Host()) as (server, _):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        reader, writer = await asyncio.open_unix_connection(str(server.path))
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_frame_arrives_in_any_pieces(tmp_path: Path) -> None:
    host = Host()
    async with linked(tmp_path, host) as (server, _):
        data = pickle.dumps([("ask", 1, True, "a", REQUEST, 1, ""), ("ask", 2, True, "b", REQUEST, 1, "")])
        reader, writer = await asyncio.open_unix_connection(str(server.path))
        for byte in struct.pack("!I", len(data)) + data:
            writer.write(bytes((byte,)))
            await writer.drain()
        assert await asyncio.wait_for(reader.readexactly(4), 10)
        assert [asked[1] for asked in host.asked] == ["a", "b"]
        writer.close()


async def test_only_this_user_reaches_the_socket_and_a_long_path_is_refused(tmp_path: Path) -> None:
    async with linked(tmp_path, Host()) as (server, one):
        assert len(await pieces(one, "a")) == 3
        folder = server.path.parent.stat()
        assert stat.S_IMODE(folder.st_mode) == 0o700 and folder.st_uid == os.getuid()
    with pytest.raises(OSError, match="too long for a socket"):
        await LinkServer(tmp_path / ("x" * 100) / "host.sock", Host().answer).start()


async def test_a_gateway_opens_a_link_beside_its_calls_and_again_after_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Links, "RETRY_S", 0.01)
    links = Links()
    assert links.to("") is None
    async with linked(tmp_path, Host()) as (server, _):
        address = str(server.path)
        assert links.to(address) is None, "the first call does not wait for it"
        await until(lambda: links.to(address))
        first = links.to(address)
        assert first is not None and links.to(address) is first
        await server.close()
        await until(lambda: links.to(address) is None)
        again = LinkServer(server.path, Host().answer)
        await again.start()
        await until(lambda: links.to(address))
        assert links.to(address) is not first
        links.close()
        await again.close()
