"""The tensors of a model's safetensors files, read into memory of this process and never mapped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coe.errors import WeightsError
from registry.headers import Tensor as Header
from registry.headers import read_weights

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES: Final = 2**24
FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types of safetensors that are converted to the type of the model as they are copied."""


class Stopped(Exception):
    """The read or the copy was stopped before its end."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells whether a file has changed: inode, bytes and time of its last change, in ns."""

    inode: int
    size_bytes: int
    changed_ns: int


class WeightFiles:
    """The weights in a folder, described by the headers of their files.

    Args:
        folder: in the Hugging Face layout, one file or shards.

    Raises:
        SourceError: there are no weights, or a file is missing, truncated or damaged.

    Attributes:
        headers: shape, type and place of each tensor, by name.
        stamps: of the files, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers, self._files = read_weights(folder)
        self.stamps = self._stamps()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.n_bytes for header in self.headers.values())

    def unchanged(self) -> bool:
        """Whether the files are those whose headers were read."""
        try:
            return self._stamps() == self.stamps
        except OSError:
            return False

    def tensors(self, stop: threading.Event | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read one tensor after the other, in the order of the files; each takes memory only while it is used.

        Raises:
            Stopped: `stop` was set.
            WeightsError: a file has become shorter.
        """
        for name, header in sorted(self.headers.items(), key=lambda item: (str(item[1].file), item[1].start)):
            yield name, _view(self._read(header.file, header.start, header.n_bytes, stop), 0, header)

    def read(self, *, pin: bool, stop: threading.Event | None = None) -> dict[str, torch.Tensor]:
        """Read all tensors, file by file.

        Args:
            pin: into page-locked memory, which an accelerator copies from at full bandwidth.

        Raises:
            Stopped, WeightsError: as `tensors`.
        """
        found: dict[str, torch.Tensor] = {}
        for file in self._files:
            parts = {name: header for name, header in self.headers.items() if header.file == file}
            if not parts:
                continue
            start = min(header.start for header in parts.values())
            end = max(header.start + header.n_bytes for header in parts.values())
            data = self._read(file, start, end - start, stop, pin=pin)
            found |= {name: _view(data, header.start - start, header) for name, header in parts.items()}
        return found

    def sample(self, name: str, n: int) -> torch.Tensor:
        """The first `n` values of a tensor, and its last `n`, as they are in the file."""
        header = self.headers[name]
        width = header.n_bytes // max(1, header.elements)
        n_bytes = min(n, header.elements) * width
        ends = (header.start, header.start + header.n_bytes - n_bytes)
        flat = Header((n_bytes // width,), n_bytes, header.dtype)
        import torch

        return torch.cat([_view(self._read(header.file, start, n_bytes, None), 0, flat) for start in ends])

    def _stamps(self) -> dict[Path, Stamp]:
        found = {file: file.stat() for file in self._files}
        return {file: Stamp(each.st_ino, each.st_size, each.st_mtime_ns) for file, each in found.items()}

    def _read(
        self, file: Path | None, start: int, n_bytes: int, stop: threading.Event | None, *, pin: bool = False
    ) -> torch.Tensor:
        """(n_bytes,) uint8."""
        import torch

        assert file is not None  # safetensors only
        data = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pin)
        values: Any = data.numpy()
        into = memoryview(values)
        with file.open("rb", buffering=0) as opened:
            opened.seek(start)
            done = 0
            while done < n_bytes:
                if stop is not None and stop.is_set():
                    raise Stopped
                count = opened.readinto(into[done : done + _CHUNK_BYTES])
                if not count:
                    raise WeightsError(f"{file} is truncated: it ends at byte {start + done:,}; copy it again")
                done += count
        return data


def _view(data: torch.Tensor, start: int, header: Header) -> torch.Tensor:
    """A part of (n,) uint8 as the tensor that it holds; copied where its place suits no view."""
    import torch

    dtype: Any = getattr(torch, FLOATS[header.dtype])
    part = data[start : start + header.n_bytes]
    if (part.storage_offset() % dtype.itemsize) != 0:
        part = part.clone()
    return part.view(dtype).view(header.shape)
