"""FileUploads: files of multipart forms, passed on while they arrive, a few hundred KiB at a time.

`aiohttp.MultipartReader` finds the parts; here their number, sizes and times are bounded. A form has one file, in the
field `file`, and short text fields in any order. The time of a body grows with its size, since files are larger than
other bodies: a client that sends fewer than `LEAST_BYTES_PER_S` is refused, and so is one that stops sending.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from starlette.requests import ClientDisconnect, Request

from coe.config import ServeConfig
from coe.errors import InvalidRequest, Overloaded
from coe.protocol.errors import RequestTooLarge
from coe.serve.http.refusals import BodyTimeout, UnsupportedMediaType

MOST_UPLOADS: Final = 16
"""Most files that a gateway process reads at once."""
MOST_FIELDS: Final = 8
"""Most fields of a form."""
MOST_FIELD_BYTES: Final = 1024
"""Most bytes of the value of a field, and of the name of a file."""
OVERHEAD_BYTES: Final = 64 * 1024
"""Most bytes of a form beside its file."""
LEAST_BYTES_PER_S: Final = 64 * 1024
"""Least speed of an upload that takes longer than other bodies may."""
PIECE_BYTES: Final = 256 * 1024
"""Bytes that are passed on at once."""


class Sink(Protocol):
    """Takes the bytes of a file."""

    async def write(self, data: bytes) -> None:
        """Take what follows."""
        ...


@dataclass(slots=True)
class Form:
    """What a form has beside the bytes of its file."""

    filename: str = ""
    fields: dict[str, str] = field(default_factory=dict)


class FileUploads:
    """Reads forms. Use inside one event loop.

    Args:
        settings: `body_timeout_s` and `body_idle_s` hold here.
        max_bytes: most bytes of a file.
    """

    def __init__(self, settings: ServeConfig, max_bytes: int) -> None:
        self._settings, self._max_bytes, self._running = settings, max_bytes, 0

    async def read(self, request: Request, sink: Sink) -> Form:
        """A form whose file goes to `sink`.

        Raises:
            UnsupportedMediaType: the body is not declared as a form.
            InvalidRequest: it is not one, has no file, or too many or too long fields.
            RequestTooLarge: it exceeds the limit of a file.
            BodyTimeout: it arrives too slowly.
            Overloaded: too many files are being read.
            ClientDisconnect: the client disconnected.
        """
        content_type = request.headers.get("content-type", "")
        if not content_type.lower().startswith("multipart/form-data"):
            raise UnsupportedMediaType(
                "the Content-Type must be multipart/form-data, with the file in the field `file`"
            )
        length = request.headers.get("content-length", "")
        most = self._max_bytes + OVERHEAD_BYTES
        if length.isdecimal() and int(length[:20]) > most:
            raise self._too_large()
        if self._running >= MOST_UPLOADS:
            raise Overloaded(f"{self._running} files are being read already; try again later")
        self._running += 1
        arriving = _Arriving(request, most, self._settings)
        try:
            return await self._form(content_type, arriving, sink)
        finally:
            self._running -= 1
            await arriving.close()

    async def _form(self, content_type: str, arriving: _Arriving, sink: Sink) -> Form:
        form, seen = Form(), 0
        try:
            reader = MultipartReader({"Content-Type": content_type}, arriving.stream)
            while (part := await reader.next()) is not None:
                seen += 1
                if not isinstance(part, BodyPartReader) or part.name is None or seen > MOST_FIELDS:
                    raise InvalidRequest(f"the form must have at most {MOST_FIELDS} fields, each with a name")
                if part.filename is not None or part.name == "file":
                    await self._file(form, part, sink)
                else:
                    await _text(form, part)
        except (ValueError, AssertionError, RuntimeError, LookupError, HttpProcessingError) as error:
            if (cause := arriving.error) is not None:
                raise cause from error
            raise InvalidRequest("the body is not a whole multipart/form-data form") from error
        if not form.filename:
            raise InvalidRequest("the form has no file in the field `file`")
        return form

    async def _file(self, form: Form, part: BodyPartReader, sink: Sink) -> None:
        name = part.filename or ""
        if part.name != "file" or form.filename:
            raise InvalidRequest("the form must have one file, in the field `file`")
        if not 1 <= len(name.encode(errors="replace")) <= MOST_FIELD_BYTES or not name.isprintable():
            raise InvalidRequest(f"the file must have a name of 1 to {MOST_FIELD_BYTES} printable bytes")
        form.filename, size = name, 0
        while piece := await part.read_chunk(PIECE_BYTES):
            size += len(piece)
            if size > self._max_bytes:
                raise self._too_large()
            await sink.write(bytes(piece))

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"the file exceeds {self._max_bytes:,} bytes (serve.batches.max_file_bytes)")


async def _text(form: Form, part: BodyPartReader) -> None:
    assert part.name is not None  # checked before
    value = bytearray()
    while piece := await part.read_chunk(MOST_FIELD_BYTES):
        value += piece
        if len(value) > MOST_FIELD_BYTES:
            raise InvalidRequest(f"the field {part.name[:80]!r} has more than {MOST_FIELD_BYTES} bytes")
    if part.name in form.fields:
        raise InvalidRequest(f"the field {part.name[:80]!r} is given twice")
    try:
        form.fields[part.name] = value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the field {part.name[:80]!r} is not UTF-8") from error


class _Paused(BaseProtocol):
    """Tells whoever feeds a StreamReader when it holds enough."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.reads = asyncio.Event()
        self.reads.set()

    @property
    def connected(self) -> bool:
        """Whether more may come: the reader waits for it."""
        return True

    def pause_reading(self) -> None:
        """The reader holds enough."""
        self._reading_paused = True
        self.reads.clear()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """The reader takes more."""
        self._reading_paused = False
        self.reads.set()


class _Arriving:
    """A body as a stream, fed within bounds of bytes and time."""

    def __init__(self, request: Request, max_bytes: int, settings: ServeConfig) -> None:
        loop = asyncio.get_running_loop()
        self._request, self._max_bytes, self._settings = request, max_bytes, settings
        self._paused = _Paused(loop)
        self.stream = StreamReader(self._paused, PIECE_BYTES, loop=loop)
        self.error: Exception | None = None
        self._feeding = asyncio.ensure_future(self._feed())

    async def close(self) -> None:
        """Read no more."""
        self._feeding.cancel()
        await asyncio.gather(self._feeding, return_exceptions=True)

    async def _feed(self) -> None:
        try:
            await self._read()
            self.stream.feed_eof()
        except Exception as error:
            self.error = error
            self.stream.set_exception(error)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        began, size, waited = loop.time(), 0, 0.0
        more = True
        while more:
            before = loop.time()
            await self._paused.reads.wait()
            waited += loop.time() - before  # for the disk, which is not the client's time
            left = began + waited + self._settings.body_timeout_s + size / LEAST_BYTES_PER_S - loop.time()
            message = await self._message(min(left, self._settings.body_idle_s))
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > self._max_bytes:
                raise RequestTooLarge(f"the form exceeds {self._max_bytes:,} bytes (serve.batches.max_file_bytes)")
            if piece:
                self.stream.feed_data(piece)

    async def _message(self, seconds: float) -> Any:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                message = await self._request.receive()
        except TimeoutError as error:
            raise BodyTimeout(
                f"the file did not arrive in time: at most {self._settings.body_idle_s:g} s without a byte "
                f"(serve.body_idle_s), and at least {LEAST_BYTES_PER_S:,} bytes per second"
            ) from error
        except Exception as error:
            raise ClientDisconnect from error  # Ray Serve raises an exception of its own
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return message
