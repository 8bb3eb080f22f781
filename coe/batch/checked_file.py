"""A file that is read twice: the digests of its blocks from the first time are compared with what is read later.

A size or a time of change would not do: a file may be rewritten at equal length, other machines see other times, and
object stores state neither reliably.
"""

from __future__ import annotations

import hashlib
import io
from typing import IO, Any

from coe.batch.errors import InputError

_BLOCK_BYTES = 2**20
"""Bytes that one digest covers, and the least that is read."""
_DIGEST_BYTES = 16


class Digests:
    """The digests of a file that is read once: of all of it, and of its blocks."""

    def __init__(self) -> None:
        self._all, self._blocks, self._left = hashlib.sha256(), bytearray(), b""
        self.size = 0

    def add(self, content: bytes) -> None:
        """Add what follows."""
        self._all.update(content)
        self.size += len(content)
        content = self._left + content
        whole = len(content) // _BLOCK_BYTES * _BLOCK_BYTES
        for start in range(0, whole, _BLOCK_BYTES):
            self._blocks += _digest(content[start : start + _BLOCK_BYTES])
        self._left = content[whole:]

    def of_file(self) -> str:
        """SHA-256 of all of it."""
        return self._all.hexdigest()

    def of_blocks(self) -> bytes:
        """The digests of all blocks; the last one may be short."""
        return bytes(self._blocks + (_digest(self._left) if self._left else b""))


def opened_as_scanned(file: IO[bytes], url: str, size: int, blocks: bytes) -> io.BufferedReader:
    """An open file whose reads raise InputError where a block is not the one that was scanned.

    Args:
        size, blocks: of the scan (`Digests`).
    """
    return io.BufferedReader(_CheckedFile(file, url, size, blocks), _BLOCK_BYTES)


def changed(url: str) -> InputError:
    """The error of a file that is not the one that was scanned."""
    return InputError(
        f"{url}: changed while it was read, and a batch has the rows of one file. Restore it and run the command again "
        "(coe batch: with --resume), or use another --out for the new file"
    )


class _CheckedFile(io.RawIOBase):
    """A file that is compared with the digests of a scan, block by block, as it is read."""

    def __init__(self, file: IO[bytes], url: str, size: int, digests: bytes) -> None:
        self._file, self._url, self._size, self._digests = file, url, size, digests
        self._at, self._number, self._block = 0, -1, b""

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset; returns it from the start of the file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most to the end of a block.

        Raises:
            InputError: the block is not the one that was scanned.
        """
        number, start = divmod(self._at, _BLOCK_BYTES)
        if number != self._number:
            self._block, self._number = self._whole(number), number
        piece = self._block[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _whole(self, number: int) -> bytes:
        length = min(_BLOCK_BYTES, self._size - number * _BLOCK_BYTES)
        if length <= 0:
            return b""
        self._file.seek(number * _BLOCK_BYTES)
        block = self._file.read(length)
        if _digest(block) != self._digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]:
            raise changed(self._url)
        return block


def _digest(block: bytes) -> bytes:
    # Twice as fast as BLAKE2 where the CPU has instructions for it.
    return hashlib.sha256(block).digest()[:_DIGEST_BYTES]
