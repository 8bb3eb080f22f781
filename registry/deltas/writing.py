"""Makes a delta of an expert's folder: `write_delta`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from registry.deltas.floats import Values, to_values
from registry.deltas.lora_factors import Ternary, lora_pairs, ternary_pair
from registry.deltas.manifest import (
    ITEM_BYTES,
    MANIFEST,
    MOST_HEADER_BYTES,
    ON_BASE,
    PAYLOAD,
    TENSORS,
    Coding,
    Delta,
    DeltaFile,
    Method,
    chunks_of,
    header_name,
    is_float,
    parse_header,
)
from registry.deltas.payload import PayloadWriter
from registry.deltas.planes import encode_planes
from registry.deltas.raw import read_bytes
from registry.deltas.restoring import OpenDelta, copy_other_files
from registry.deltas.selection import Threshold, threshold
from registry.deltas.signs import Signs, encode_signs
from registry.errors import SourceError
from registry.headers import ADAPTER_FILE, Tensor, read_adapter_weights, read_weights
from registry.storage import sha256_file


@dataclass(frozen=True, slots=True)
class Compression:
    """How weights are compressed.

    Attributes:
        density: share of the weights that ComPEFT keeps, in (0, 1]; None compresses exactly.
        alpha: factor of ComPEFT's scales; 1 is closest to the weights, more makes up for the weights left out.
    """

    density: float | None = None
    alpha: float = 1.0

    @property
    def method(self) -> Method:
        """The name of the method."""
        return "exact" if self.density is None else "compeft"


def write_delta(
    folder: Path,
    out: Path,
    how: Compression,
    *,
    expert: str,
    base: Path | None = None,
    base_digest: str | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Delta:
    """Compress the expert in `folder` into the existing, empty folder `out`, restore it once, and compare.

    `exact` stores a tensor as XOR with the base's of the same name, shape and type, else whole. `compeft`
    (arXiv 2311.13171) keeps the largest share `density` of all differences from the base as signs times a scale. It
    differs from the paper: a scale per tensor, alpha times the mean size of what is kept there, in place of one scale,
    alpha times the standard deviation. Of a LoRA adapter it codes A and B themselves (`lora_factors.py`), the share of
    each matrix. What has no difference from a base, or is no float, is stored exactly.

    Args:
        expert: digest of the expert.
        base: folder of the base, whose digest is `base_digest`; None for an adapter.
        on_bytes: called with the bytes of each step; all steps are twice the bytes of the weights.

    Raises:
        SourceError: files are missing or damaged, or have types that deltas do not hold.
        OSError: among others, no space left.
    """
    source = _Source.open(folder, base)
    codings = {name: _coding(tensor, source, name, how) for name, tensor in source.tensors.items()}
    steps = _Steps.of(source, codings, how)
    with PayloadWriter(out / PAYLOAD, [*map(header_name, source.headers), TENSORS]) as payload:
        for name, header in source.headers.items():
            payload.add(header_name(name), [encode_planes(np.frombuffer(header, np.uint8), 1)])
        coded = (_encoded(source, name, tensor, codings[name], steps) for name, tensor in source.tensors.items())
        sizes = (tensor.n_bytes for tensor in source.tensors.values())
        payload.add(TENSORS, _counted(coded, sizes, on_bytes))
    delta = Delta(
        method=how.method,
        base=base_digest if any(coding in ON_BASE for coding in codings.values()) else None,
        expert=expert,
        density=how.density,
        alpha=how.alpha if how.density is not None else None,
        files=source.files,
        tensors=tuple((coding, steps.scale(name, how.alpha)) for name, coding in codings.items()),
    )
    delta = _checked(delta, out, base, on_bytes)
    copy_other_files(folder, out)
    (out / MANIFEST).write_text(delta.model_dump_json() + "\n", encoding="utf-8")
    return delta


@dataclass(frozen=True)
class _Source:
    """The files of an expert, and its base's tensors that have a counterpart."""

    headers: Mapping[str, bytes]
    files: tuple[DeltaFile, ...]
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    is_adapter: bool

    @classmethod
    def open(cls, folder: Path, base: Path | None) -> _Source:
        is_adapter = (folder / "adapter_config.json").is_file()
        tensors = read_adapter_weights(folder) if is_adapter else read_weights(folder)[0]
        paths = [folder / ADAPTER_FILE] if is_adapter else sorted(read_weights(folder)[1])
        headers = {path.name: _header_of(path) for path in paths}
        # In the order of their bytes in the files, in which they are restored.
        parsed = {path.name: parse_header(headers[path.name], path, path.stat().st_size) for path in paths}
        ordered = {name: tensors[name] for each in parsed.values() for name in each}
        found = {} if base is None else read_weights(base)[0]
        counterparts = {
            name: found[name] for name, tensor in ordered.items() if name in found and found[name].shape == tensor.shape
        }
        files = tuple(_file(path, len(headers[path.name])) for path in paths)
        return cls(headers, files, ordered, counterparts, is_adapter)

    def difference(self, name: str, first: int, count: int) -> Values:
        """Weights minus the base's, flat, in float32."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self._values(self.tensors[name], first, count) - self._values(self.base[name], first, count)

    @staticmethod
    def _values(tensor: Tensor, first: int, count: int) -> Values:
        item = ITEM_BYTES[tensor.dtype]
        return to_values(read_bytes(tensor, first * item, count * item), tensor.dtype)

    def matrix(self, name: str) -> Values:
        """A whole tensor of floats, in its shape."""
        tensor = self.tensors[name]
        return self._values(tensor, 0, tensor.elements).reshape(tensor.shape)


@dataclass
class _Steps:
    """The signs and scales of ternary tensors: of adapters known before, else found while they are coded."""

    known: dict[str, Ternary] = field(default_factory=dict)
    threshold: Threshold | None = None
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: _Source, codings: dict[str, Coding], how: Compression) -> _Steps:
        if how.density is None:
            return cls()
        if source.is_adapter:
            known: dict[str, Ternary] = {}
            for a, b in lora_pairs(source.tensors):
                if codings[a] == codings[b] == "signs":
                    pair = ternary_pair(source.matrix(a), source.matrix(b), how.density)
                    known |= dict(zip((a, b), pair, strict=True))
            codings |= {name: "whole" for name, coding in codings.items() if coding == "signs" and name not in known}
            return cls(known)
        names = [name for name, coding in codings.items() if coding == "added"]
        total = sum(source.tensors[name].elements for name in names)

        def pieces() -> Iterator[Values]:
            for name in names:
                for first, count in chunks_of(source.tensors[name]):
                    yield source.difference(name, first, count)

        return cls(threshold=threshold(pieces, round(how.density * total)))

    def taken(self, name: str, values: Values) -> Signs:
        """The signs of the next values of a tensor, which count for its scale."""
        assert self.threshold is not None  # `of` sets it where tensors are added
        signs = self.threshold.signs(values)
        kept = np.abs(values[signs != 0])
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = total + float(kept.sum(dtype=np.float64)), count + kept.size
        return signs

    def scale(self, name: str, alpha: float) -> float:
        """The scale of a tensor whose signs are coded; 0 where it has none."""
        if name in self.known:
            return _float32(alpha * self.known[name][1])
        total, count = self.sums.get(name, (0.0, 0))
        return _float32(alpha * total / count) if count else 0.0


def _coding(tensor: Tensor, source: _Source, name: str, how: Compression) -> Coding:
    base = source.base.get(name)
    if how.density is not None and is_float(tensor):
        if source.is_adapter:
            return "signs" if bool(np.isfinite(source.matrix(name)).all()) else "whole"
        if base is not None and is_float(base) and _is_finite(source, name):
            return "added"
    return "xor" if base is not None and base.dtype == tensor.dtype else "whole"


def _is_finite(source: _Source, name: str) -> bool:
    chunks = chunks_of(source.tensors[name])
    return all(bool(np.isfinite(source.difference(name, first, count)).all()) for first, count in chunks)


def _encoded(source: _Source, name: str, tensor: Tensor, coding: Coding, steps: _Steps) -> bytes:
    """The coded form of a tensor: see `manifest.TENSORS`."""
    chunks = [_encoded_chunk(source, name, tensor, coding, steps, first, count) for first, count in chunks_of(tensor)]
    return b"".join([*(len(chunk).to_bytes(4, "little") for chunk in chunks), *chunks])


def _encoded_chunk(
    source: _Source, name: str, tensor: Tensor, coding: Coding, steps: _Steps, first: int, count: int
) -> bytes:
    if coding == "signs":
        return encode_signs(steps.known[name][0].reshape(-1)[first : first + count])
    if coding == "added":
        return encode_signs(steps.taken(name, source.difference(name, first, count)))
    item = ITEM_BYTES[tensor.dtype]
    raw = read_bytes(tensor, first * item, count * item)
    if coding == "xor":
        raw ^= read_bytes(source.base[name], first * item, count * item)
    return encode_planes(raw, item)


def _counted(coded: Iterable[bytes], sizes: Iterable[int], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    for data, size in zip(coded, sizes, strict=True):
        yield data
        on_bytes(size)


def _checked(delta: Delta, out: Path, base: Path | None, on_bytes: Callable[[int], None]) -> Delta:
    """The delta with the hashes of what it restores; those of an exact one are the hashes of the expert's files."""
    opened = OpenDelta.open(out, delta)
    files = tuple(opened.hashed(file, base, on_bytes) for file in delta.files)
    if delta.method == "exact" and files != delta.files:
        raise SourceError(f"what {out} restores differs from the expert: its files were changed while they were read")
    return delta.model_copy(update={"files": files})


def _header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER_BYTES:
            raise SourceError(f"the header of {path} has {length:,} bytes; at most {MOST_HEADER_BYTES:,} are stored")
        return file.read(length)


def _file(path: Path, header_bytes: int) -> DeltaFile:
    return DeltaFile(
        name=path.name, size_bytes=path.stat().st_size, header_bytes=header_bytes, sha256=sha256_file(path)
    )


def _float32(value: float) -> float:
    """As it is applied, in the fewest digits that JSON needs for that."""
    return float(str(np.float32(value)))
