"""Writes a safetensors file of byte arrays one after the other, without holding them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

_MOST_OFFSET = 10**16 - 1


class PayloadWriter:
    """A new safetensors file; a context manager.

    The header comes first in the file and is written last: room for its longest form is left, and filled with spaces.

    Args:
        names: of the arrays, in the order in which they are added.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        widest = {name: _entry(0, _MOST_OFFSET) | {"data_offsets": [_MOST_OFFSET] * 2} for name in names}
        self._room = -(-len(json.dumps(widest).encode()) // 8) * 8
        self._offsets: dict[str, tuple[int, int]] = {}
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, pieces: Iterable[bytes]) -> None:
        """Append an array of bytes, in pieces."""
        start = self._file.tell() - 8 - self._room
        for piece in pieces:
            self._file.write(piece)
        self._offsets[name] = (start, self._file.tell() - 8 - self._room)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file as file:
            if error is None:
                header = json.dumps({name: _entry(*offsets) for name, offsets in self._offsets.items()}).encode()
                file.seek(0)
                file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def _entry(start: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
