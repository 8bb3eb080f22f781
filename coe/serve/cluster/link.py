"""Links: connections from gateways to the expert hosts of the same machine, one for each pair, beside Ray Serve.

A call through Serve's handle costs more CPU than all of the gateway's own work (docs/results.md). Serve starts, checks,
scales and replaces the processes as before, and its handle takes every call for which there is no link: the host is on
another machine, or has just started.

A frame is its length (4 bytes, big-endian) and a pickled list of messages: what one turn of the event loop produces for
one connection is one frame.

    to a host     (ASK, number, stream, expert, request, generation, call id), (CANCEL, number)
    to a gateway  (number, piece), (number, None) after the last piece, (number, Broken(why)) of a bug in the host

The Unix sockets are in a folder that only this user can read, since whoever can write to one can run code here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from coe.types import GenerateRequest

ASK: Final = "ask"
CANCEL: Final = "cancel"
MOST_FRAME_BYTES: Final = 512 * 2**20
"""Most bytes of a frame; a longer one ends the connection."""
HIGH_WATER_BYTES: Final = 4 * 2**20
"""Unsent bytes above which a host waits before it sends more to a gateway."""
SETTLE_S: Final = 0.1
"""Seconds in which a call that was sent before a host began to end arrives."""
MOST_PATH: Final = 100
"""Most bytes of a socket's path; systems allow 104 or 108."""
_LENGTH: Final = struct.Struct("!I")
log = logging.getLogger("ray.serve")


class LinkLost(Exception):
    """The connection to a host has ended: its process, most likely, too."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A bug in the host ended the call; its log has the traceback."""

    why: str


class Frames(asyncio.Protocol, ABC):
    """Messages in both directions on one connection. A subclass handles those that come, in `received`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[Any] = []
        self._in = bytearray()
        self._may_write = asyncio.Event()
        self._may_write.set()

    @property
    def is_up(self) -> bool:
        """Whether messages can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses of it
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release those who wait to write."""
        self._may_write.set()

    def pause_writing(self) -> None:
        """Let `room` wait."""
        self._may_write.clear()

    def resume_writing(self) -> None:
        """End the wait of `room`."""
        self._may_write.set()

    async def room(self) -> None:
        """Return once little is left unsent."""
        if not self._may_write.is_set():
            await self._may_write.wait()

    def send(self, message: Any) -> None:
        """Send a message with all others of this turn of the event loop. Without a connection it is lost."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(message)

    def _flush(self) -> None:
        messages, self._out = self._out, []
        if not self.is_up or self._transport is None:
            return
        try:
            data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        except Exception:  # of one message; the others must arrive
            data = pickle.dumps([self._sendable(message) for message in messages], pickle.HIGHEST_PROTOCOL)
        self._transport.writelines((_LENGTH.pack(len(data)), data))

    @staticmethod
    def _sendable(message: Any) -> Any:
        try:
            pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            return (message[0], Broken(f"{type(error).__name__}: {error}"))
        return message

    def data_received(self, data: bytes) -> None:
        """Take the frames that are complete."""
        self._in += data
        start = 0
        while len(self._in) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in, start)
            if size > MOST_FRAME_BYTES:
                self.abort()
                return
            end = start + _LENGTH.size + size
            if len(self._in) < end:
                break
            messages = pickle.loads(memoryview(self._in)[start + _LENGTH.size : end])
            start = end
            for message in messages:
                self.received(message)
        if start:
            self._in = self._in[start:]

    @abstractmethod
    def received(self, message: Any) -> None:
        """Handle a message."""

    def end(self) -> None:
        """Close the connection after what was sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()


class Link(Frames):
    """A gateway's end."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, _Pieces] = {}
        self._number = 0

    @classmethod
    async def to(cls, path: str) -> Link:
        """A link to the host that listens there. Raises OSError if none does."""
        _, link = await asyncio.get_running_loop().create_unix_connection(cls, path)
        return link

    async def ask(self, expert: str, request: GenerateRequest, generation: int, call: str) -> AsyncGenerator[Any, None]:
        """The pieces of an answer, as `ExpertHost.stream` or `whole`. Closing the iterator cancels the call.

        Raises:
            LinkLost: the connection ended.
        """
        self._number = number = self._number + 1
        pieces = self._calls[number] = _Pieces(self._loop)
        if not self.is_up:
            pieces.lose()
        self.send((ASK, number, request.stream, expert, request, generation, call))
        ended = False
        try:
            while (piece := await pieces.next()) is not None:
                yield piece
            ended = True
        finally:
            del self._calls[number]
            if not ended:
                self.send((CANCEL, number))

    def received(self, message: Any) -> None:
        """Give a piece to its call."""
        number, piece = message
        if number in self._calls:
            self._calls[number].put(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all calls."""
        super().connection_lost(exc)
        for pieces in self._calls.values():
            pieces.lose()


class _Pieces:
    """The pieces of a call that have come and were not taken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._held, self._lost = loop, deque[Any](), False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, piece: Any) -> None:
        self._held.append(piece)
        self._wake()

    def lose(self) -> None:
        self._lost = True
        self._wake()

    async def next(self) -> Any:
        """The next piece. Raises LinkLost."""
        while not self._held:
            if self._lost:
                raise LinkLost("the connection to the host has ended")
            self._waiting = self._loop.create_future()
            await self._waiting
        return self._held.popleft()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


Answer = Callable[[bool, str, GenerateRequest, int, str], AsyncGenerator[Any, None]]
"""`(stream, expert, request, generation, call id)` -> the pieces of an answer."""


class LinkServer:
    """A host's end of all its links.

    Args:
        path: where to listen; its folder becomes readable for this user only.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path, self._answer = path, answer
        self._links: set[_Served] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept links. Raises OSError if the path cannot be listened on."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        if len(str(self.path).encode()) > MOST_PATH:
            raise OSError(f"{self.path} is too long for a socket")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Served(self._links, self._answer), str(self.path))

    async def close(self, grace_s: float = 0.0) -> None:
        """Accept no more links, and end those there are once their calls are over, or the grace is."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        loop = asyncio.get_running_loop()
        ends = loop.time() + grace_s
        await asyncio.sleep(min(SETTLE_S, grace_s))  # for calls that are on their way
        while any(link.calls for link in self._links) and loop.time() < ends:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for link in list(self._links):
            link.end()
        await asyncio.sleep(0)  # the connections close in the next turn of the loop


class _Served(Frames):
    """A host's end of one link."""

    def __init__(self, links: set[_Served], answer: Answer) -> None:
        super().__init__()
        self._links, self._answer = links, answer
        self.calls: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the links of the host."""
        super().connection_made(transport)
        self._links.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all calls: their gateway is gone."""
        super().connection_lost(exc)
        self._links.discard(self)
        for task in self.calls.values():
            task.cancel()

    def received(self, message: Any) -> None:
        """Begin or cancel a call."""
        kind, number, *rest = message
        if kind == ASK:
            self.calls[number] = task = self._loop.create_task(self._serve(number, *rest))
            task.add_done_callback(lambda _: self.calls.pop(number, None))  # also of one that is cancelled at once
        elif number in self.calls:
            self.calls[number].cancel()

    async def _serve(self, number: int, *asked: Any) -> None:
        try:
            async with contextlib.aclosing(self._answer(*asked)) as pieces:
                async for piece in pieces:
                    self.send((number, readable(piece) if isinstance(piece, Exception) else piece))
                    await self.room()
        except Exception as error:
            log.exception("a call failed")
            self.send((number, Broken(f"{type(error).__name__}: {error}")))
        finally:
            self.send((number, None))


def readable(error: Exception) -> Exception | Broken:
    """An error that a gateway can read. One that it cannot, as of a plugin's class, would end the whole connection."""
    try:
        pickle.loads(pickle.dumps(error, pickle.HIGHEST_PROTOCOL))
    except Exception:
        return Broken(f"{type(error).__name__}: {error}")
    return error


class Links:
    """The links of a gateway, by host. Use inside one event loop.

    Args:
        connect: opens a link to an address.
    """

    RETRY_S: Final = 1.0
    """Seconds until a link that could not be opened is tried again."""

    def __init__(self, connect: Callable[[str], Awaitable[Link]] = Link.to) -> None:
        self._connect = connect
        self._links: dict[str, Link] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}

    def to(self, address: str) -> Link | None:
        """The link to the host with this address; None if there is none yet, and it is opened meanwhile."""
        link = self._links.get(address)
        if link is not None and link.is_up:
            return link
        if address and address not in self._opening:
            self._links = {name: each for name, each in self._links.items() if each.is_up}
            self._opening[address] = asyncio.get_running_loop().create_task(self._open(address))
        return None

    async def _open(self, address: str) -> None:
        try:
            self._links[address] = await self._connect(address)
        except OSError as error:  # a host of another machine, or gone
            log.debug("no link to %s: %s", address, error)
            await asyncio.sleep(self.RETRY_S)
        finally:
            del self._opening[address]

    def close(self) -> None:
        """Close all links."""
        for task in self._opening.values():
            task.cancel()
        for link in self._links.values():
            link.end()
