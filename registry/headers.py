"""Tensors of safetensors files, from their headers alone: no weights are read, no framework is needed.

Format: 8 bytes of header length (little endian), the header as JSON, then the data to the end of the file.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.errors import SourceError
from registry.json_text import loads

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_JSON_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape, outermost dimension first, and bytes on disk of one tensor.

    Attributes:
        dtype: as safetensors names it ("F32", "BF16"); empty for GGUF.
        file, start: where its bytes are; `None` and 0 for GGUF.
    """

    shape: tuple[int, ...]
    n_bytes: int
    dtype: str = field(default="", compare=False)
    file: Path | None = field(default=None, compare=False)
    start: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)


def check_regular(path: Path) -> int:
    """Bytes of a regular file. Opening a pipe or a device may block, so this comes before.

    Raises:
        SourceError: the path is a pipe, a socket, a device or a folder.
        OSError: there is no such file, or its folder cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise SourceError(f"{path} is {kind}, not a file")
    return status.st_size


def read_json(path: Path, *, most_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a model. Raises SourceError if it is missing, too large or not a JSON object."""
    try:
        if (size := check_regular(path)) > most_bytes:
            raise SourceError(f"{path} has {size:,} bytes; the most is {most_bytes:,}")
        value = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Names and shapes of a safetensors file.

    Raises:
        SourceError: the file is missing, truncated (with both sizes) or not safetensors.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if size == 0 or length > size - 8 or length > _MAX_HEADER_BYTES:
                raise SourceError(f"{path} is truncated or not safetensors: {size:,} bytes, its header says {length:,}")
            header = loads(file.read(length))
        tensors = {name: _tensor(entry, path, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        end = (
            8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name in tensors), default=0)
        )
    except FileNotFoundError:
        raise SourceError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise SourceError(f"{path} is not a safetensors file, or it is damaged: {error}") from error
    if end > size:
        raise SourceError(f"{path} is truncated: {size:,} bytes of {end:,}; download or copy it again")
    _check_layout(path)
    return tensors


def read_weights(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """All tensors of a model folder (one file, or all shards of its index), and their files.

    Raises:
        SourceError: there are no weights or only pickles, or a shard is missing or truncated.
    """
    if (folder / SINGLE_FILE).exists():
        return read_safetensors(folder / SINGLE_FILE), [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        raise _no_weights(folder, SINGLE_FILE)
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise SourceError(f"{folder / INDEX_FILE} has no weight_map of file names")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise SourceError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])}")
    tensors = {name: tensor for shard in shards for name, tensor in read_safetensors(shard).items()}
    if absent := sorted(set(weight_map) - set(tensors)):
        raise SourceError(
            f"{folder}: {absent[0]!r} (and {len(absent) - 1} more) is in no shard, though the index says so"
        )
    return tensors, shards


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder. Raises SourceError like `read_weights`."""
    if not (folder / ADAPTER_FILE).exists():
        raise _no_weights(folder, ADAPTER_FILE)
    return read_safetensors(folder / ADAPTER_FILE)


def _tensor(entry: Mapping[str, Any], path: Path, data_start: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return Tensor(shape, end - start, str(entry["dtype"]), path, data_start + start)


def _check_layout(path: Path) -> None:
    """Let the safetensors library check the rest: overlaps, gaps, shapes against bytes, unknown types."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is damaged: {error}") from error


def _is_file_name(name: object) -> bool:
    """Whether it is a plain file name: an index must not lead outside its folder."""
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _no_weights(folder: Path, wanted: str) -> SourceError:
    if not folder.is_dir():
        return SourceError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is not a folder")
    if (folder / wanted).is_symlink():
        return SourceError(
            f"{folder / wanted} is a symbolic link to {(folder / wanted).readlink()}, which is not there"
        )
    found = sorted(path.name for path in folder.iterdir())
    if any(Path(name).suffix in _PICKLE_SUFFIXES for name in found):
        return SourceError(
            f"{folder} has pickled weights only; pickles can run any code and are never loaded: "
            f"download or convert the weights to safetensors ({wanted})"
        )
    if gguf := [name for name in found if name.lower().endswith(".gguf")]:
        return SourceError(f"{folder} has no {wanted}; to use its GGUF file, set the source to {folder / gguf[0]}")
    return SourceError(f"{folder} has no {wanted} (it has {', '.join(found[:5]) or 'no files'})")
