"""Metadata and tensors of a GGUF file, from its header alone.

Not read with `gguf.GGUFReader`, which builds several arrays for every token of the vocabulary (20 s for 262k tokens)
and trusts the lengths in the file. Registration needs no arrays: this reader skips them and checks every length
against the file size. transformers unpacks the weights themselves.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from registry.errors import SourceError
from registry.headers import Tensor, check_regular
from registry.quantization import GGUF

# fmt: off
SUPPORTED_ARCHITECTURES = frozenset((
    "bloom", "deci", "falcon", "gemma2", "gemma3", "gemma4", "gpt-oss", "gpt2", "lfm2", "llama", "mamba", "minimax-m2",
    "mistral", "nemotron", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2", "t5",
    "t5encoder",
))
# fmt: on
"""`general.architecture` of the files that transformers 5.19 can load (a test compares it with its own list)."""

_MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_MAX_ARRAY_LEVELS = 4
_MAX_FIELDS, _MAX_TENSORS = 10_000, 100_000
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 13, 12
_MAX_STRING_BYTES = 2**24
_MAX_READS = 4_000_000  # of numbers and strings; a vocabulary of 256,000 tokens takes half of a million


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Scalar and string metadata (arrays are left out), and every tensor, outermost dimension first."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as `llama`."""
        return str(self.fields.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """`gguf` with the type that most tensors have, if it is stated, such as `gguf-q4_1`."""
        from gguf import LlamaFileType

        number = self.fields.get("general.file_type")
        try:
            stated = LlamaFileType(number if isinstance(number, int) else -1)
        except ValueError:
            return GGUF
        return f"{GGUF}-{stated.name.removeprefix('MOSTLY_').removeprefix('ALL_').lower()}"

    def of_architecture(self, key: str) -> int | None:
        """An integer under the architecture's prefix: `context_length` is `llama.context_length`."""
        value = self.fields.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_gguf(path: Path) -> bool:
    """Whether the content of a regular file is GGUF, whatever its name. Raises OSError if it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        SourceError: the file is missing, truncated, damaged, or of an unsupported architecture.
    """
    try:
        check_regular(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data).header()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except (OSError, ValueError, LookupError) as error:
        raise SourceError(f"{path} is damaged or not GGUF: {error}; download or copy it again") from error
    if header.fields.get("split.count", 1) != 1:
        raise SourceError(f"{path} is one part of a split GGUF: merge the parts first (llama-gguf-split --merge)")
    if header.architecture not in SUPPORTED_ARCHITECTURES:
        raise SourceError(
            f"{path} is of architecture {header.architecture[:80]!r}, which transformers cannot load from GGUF; "
            f"use its safetensors instead. Supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )
    return header


class _Reader:
    """Reads through the header; a length that leads outside the file is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at, self._reads = data, len(data), 0, 0

    def header(self) -> GgufHeader:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not start with 'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} (big-endian, or unknown) is not supported")
        n_tensors, n_fields = self._number("<Q"), self._number("<Q")
        self._check_inside(n_fields * _LEAST_FIELD_BYTES + n_tensors * _LEAST_TENSOR_BYTES)
        for what, n, most in (("tensors", n_tensors, _MAX_TENSORS), ("fields", n_fields, _MAX_FIELDS)):
            if n > most:
                raise ValueError(f"{n:,} {what}; the most is {most:,}")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self._string()
            if (value := self._value(self._number("<I"))) is not None:
                fields[name] = value
        infos = [self._tensor_info() for _ in range(n_tensors)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        end = max((start + offset + tensor.n_bytes for _, tensor, offset in infos), default=0)
        if end > self._size:
            raise ValueError(f"{self._size:,} bytes of {end:,}")
        _check_separate(infos)
        return GgufHeader(fields, {name: tensor for name, tensor, _ in infos})

    def _tensor_info(self) -> tuple[str, Tensor, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, n_dimensions = self._string(), self._number("<I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has {n_dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(n_dimensions)]))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("<I"))]
        tensor = Tensor(shape, Tensor(shape, 0).elements // block * block_bytes)
        return name, tensor, self._number("<Q")

    def _value(self, kind: int, level: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"unknown type {kind} of a field")
        if level == _MAX_ARRAY_LEVELS:
            raise ValueError(f"arrays are nested more than {_MAX_ARRAY_LEVELS} levels deep")
        item, count = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[item]))
            return None
        for _ in range(count):
            self._skip(self._number("<Q")) if item == _STRING else self._value(item, level + 1)
        return None

    def _string(self) -> str:
        count = self._number("<Q")
        self._check_inside(count)
        if count > _MAX_STRING_BYTES:
            raise ValueError(f"a string of {count:,} bytes; the most is {_MAX_STRING_BYTES:,}")
        return self._take(count).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count)
        return self._data[start : self._at]

    def _skip(self, count: int) -> None:
        self._reads += 1
        if self._reads > _MAX_READS:
            raise ValueError(f"the header has more than {_MAX_READS:,} values")
        self._check_inside(count)
        self._at += count

    def _check_inside(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"{count:,} bytes are stated at {self._at:,} of {self._size:,}")


def _check_separate(infos: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raise ValueError where two tensors have the same name or share bytes."""
    if len({name for name, _, _ in infos}) < len(infos):
        raise ValueError("two tensors have the same name")
    placed = sorted((offset, offset + tensor.n_bytes, name) for name, tensor, offset in infos)
    for (_, end, first), (start, _, second) in pairwise(placed):
        if start < end:
            raise ValueError(f"the tensors {first!r} and {second!r} overlap")
