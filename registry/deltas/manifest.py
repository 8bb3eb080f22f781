"""`delta.json`, which states what a delta restores, and the table of the restored tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import SourceError
from registry.headers import Tensor, read_json
from registry.json_text import loads

FLOATS = frozenset({"F32", "F16", "BF16"})
"""The types that are read as numbers."""
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of an element, by the name of its type in safetensors."""
MANIFEST = "delta.json"
PAYLOAD = "delta.safetensors"
TENSORS = "tensors"
"""Name in `delta.safetensors` of all coded tensors, one after the other: the byte lengths of the chunks of a tensor as
uint32, then the chunks."""
CHUNK = 2**22
"""Elements of a tensor that are coded together, which bounds the memory of coding and decoding."""
_MOST_FILES = 10_000
_MOST_TENSORS = 1_000_000
MOST_HEADER_BYTES = 2**25
_MOST_BYTES = 2**46
"""Of all restored files: 64 TiB."""
_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors"
_DIGEST = r"sha256:[0-9a-f]{64}"

Coding = Literal["xor", "whole", "added", "signs"]
"""How a tensor is stored: XOR with the base's, itself, the base's plus signs times a scale, signs times a scale."""
ON_BASE = frozenset({"xor", "added"})
TERNARY = frozenset({"added", "signs"})
Scale = Annotated[float, Field(allow_inf_nan=False)]
Method = Literal["exact", "compeft"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class DeltaFile(_Part):
    """A file that the delta restores."""

    name: Annotated[str, Field(pattern=f"^{_FILE_NAME}$")]
    size_bytes: Annotated[int, Field(ge=8, le=_MOST_BYTES)]
    header_bytes: Annotated[int, Field(ge=2, le=MOST_HEADER_BYTES)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Delta(_Part):
    """The content of `delta.json`."""

    format: Literal[1] = 1
    """Version of the format."""
    method: Method
    """`exact` restores the registered files; `compeft` others with nearly the same answers."""
    base: Annotated[str, Field(pattern=f"^{_DIGEST}$")] | None = None
    """Digest of the base that the weights are a difference from; null for a LoRA adapter."""
    expert: Annotated[str, Field(pattern=f"^{_DIGEST}$")]
    """Digest of the expert that was compressed."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the weights that ComPEFT keeps."""
    alpha: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Factor of ComPEFT's scales."""
    files: Annotated[tuple[DeltaFile, ...], Field(min_length=1, max_length=_MOST_FILES)]
    tensors: Annotated[tuple[tuple[Coding, Scale], ...], Field(max_length=_MOST_TENSORS)]
    """Coding of every tensor and its scale (of TERNARY ones), in the order of files and of the bytes in them."""

    @property
    def needs_base(self) -> bool:
        """Whether a tensor is a difference from the base."""
        return any(coding in ON_BASE for coding, _ in self.tensors)


def is_delta(path: Path) -> bool:
    """Whether the path is the folder of a delta."""
    return (path / MANIFEST).is_file()


def read_delta(folder: Path) -> Delta:
    """The manifest of a delta.

    Raises:
        SourceError: it is missing, damaged, contradicts itself, or is of a later version.
    """
    file = folder / MANIFEST
    document = read_json(file)
    if (version := document.get("format")) != 1:
        raise SourceError(f"{file} has the format {version!r}; this version of coe reads format 1: update coe")
    try:
        delta = Delta.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SourceError(f"{file} is damaged: {place}: {first['msg']}; copy the delta again") from None
    if len({entry.name for entry in delta.files}) < len(delta.files):
        raise SourceError(f"{file} names a file twice")
    if delta.needs_base and delta.base is None:
        raise SourceError(f"{file} has differences from a base, but no digest of it")
    return delta


def header_name(file: str) -> str:
    """Name in `delta.safetensors` of the header of a restored file, compressed."""
    return f"header/{file}"


def parse_header(header: bytes, file: Path, size_bytes: int) -> dict[str, Tensor]:
    """The tensors of a restored safetensors file, in the order of their bytes, without gaps.

    Args:
        header: its JSON. file: its name, for errors. size_bytes: of the whole file.

    Raises:
        SourceError: it is not a header of such a file, or has a type that deltas do not hold.
    """
    try:
        entries = {name: entry for name, entry in loads(header).items() if name != "__metadata__"}
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError, OverflowError) as error:
        raise SourceError(f"the header of {file.name} in its delta is damaged: {error}") from error
    end = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)))
    for name, tensor in ordered.items():
        if tensor.dtype not in ITEM_BYTES:
            raise SourceError(f"{file.name}: {name} is of type {tensor.dtype}, which deltas do not hold")
        if tensor.start != end or tensor.n_bytes != tensor.elements * ITEM_BYTES[tensor.dtype]:
            raise SourceError(f"the header of {file.name} in its delta is damaged: place and size of {name} do not fit")
        end += tensor.n_bytes
    if 8 + len(header) + end != size_bytes:
        raise SourceError(f"{file.name} has {size_bytes:,} bytes, but its header states {8 + len(header) + end:,}")
    return ordered


def is_float(tensor: Tensor) -> bool:
    """Whether its values are read as numbers."""
    return tensor.dtype in FLOATS


def chunks_of(tensor: Tensor) -> list[tuple[int, int]]:
    """(first element, number of elements) of each chunk."""
    return [(start, min(CHUNK, tensor.elements - start)) for start in range(0, tensor.elements, CHUNK)]


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(size) is int and 0 <= size <= _MOST_BYTES for size in (start, end, *shape)):
        raise ValueError("sizes are whole numbers")
    if math.prod(size or 1 for size in shape) > _MOST_BYTES:
        raise ValueError("a shape is too large")
    return Tensor(shape, end - start, str(entry["dtype"]), start=start)
