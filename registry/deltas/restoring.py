"""The expert's safetensors files, of a delta and its base: as files, or tensor by tensor in memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from registry.deltas.floats import Bytes, to_bytes, to_values
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
    chunks_of,
    header_name,
    is_float,
    parse_header,
    read_delta,
)
from registry.deltas.planes import decode_planes
from registry.deltas.raw import read_bytes
from registry.deltas.signs import decode_signs
from registry.errors import SourceError
from registry.headers import Tensor, read_safetensors, read_weights
from registry.storage import require_free

_NOT_COPIED = frozenset({MANIFEST, PAYLOAD})


@dataclass(frozen=True)
class OpenDelta:
    """A delta whose parts fit together.

    Attributes:
        stored: name -> its coded form, bytes of `delta.safetensors`.
        headers: file name -> its header as bytes.
        tensors: file name -> its tensors by name, in the order of their bytes.
    """

    folder: Path
    delta: Delta
    stored: Mapping[str, Tensor]
    headers: Mapping[str, bytes]
    tensors: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def open(cls, folder: Path, delta: Delta | None = None) -> OpenDelta:
        """Read the manifest and all headers, no weights.

        Args:
            delta: the manifest, where it is not written yet.

        Raises:
            SourceError: a file is missing or damaged, or they contradict each other.
        """
        delta = read_delta(folder) if delta is None else delta
        payload = read_safetensors(folder / PAYLOAD)
        headers = {file.name: _header(folder, payload, file) for file in delta.files}
        tensors = {
            file.name: parse_header(headers[file.name], folder / file.name, file.size_bytes) for file in delta.files
        }
        pairs = [pair for each in tensors.values() for pair in each.items()]
        if len(pairs) != len(delta.tensors) or len({name for name, _ in pairs}) < len(pairs):
            raise SourceError(f"{folder / MANIFEST} and {PAYLOAD} beside it have different tensors; copy both again")
        return cls(folder, delta, _places(folder, payload, pairs), headers, tensors)

    @cached_property
    def how(self) -> dict[str, tuple[Coding, float]]:
        """Tensor -> its coding and scale."""
        return dict(zip(self.table, self.delta.tensors, strict=True))

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """All restored tensors by name: shapes, types and sizes; their bytes are in no file yet."""
        return {name: tensor for each in self.tensors.values() for name, tensor in each.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of the restored files."""
        return sum(file.size_bytes for file in self.delta.files)

    def file_values(self, file: DeltaFile, base: Path | None) -> Iterator[tuple[str, Tensor, Iterator[Bytes]]]:
        """(name, tensor, its bytes in chunks) of every tensor of one file, in the order of their bytes.

        All chunks must be read: after the last one, the file's SHA-256 is compared.

        Args:
            base: folder of the base; None for a delta without one.

        Raises:
            SourceError: the delta or its base is damaged, or the base is another one.
        """
        sha256 = self._hash(file)
        for name, tensor, chunks in self._decoded(file, base):
            yield name, tensor, _hashing(sha256, chunks)
        if sha256.hexdigest() != file.sha256:
            raise SourceError(
                f"{self.folder}: the restored {file.name} is not the one that was stored: the delta or its base "
                f"{base or ''} is damaged or another one; copy both again"
            )

    def hashed(self, file: DeltaFile, base: Path | None, on_bytes: Callable[[int], None]) -> DeltaFile:
        """The file with the SHA-256 of what is restored."""
        sha256 = self._hash(file)
        for _, _, chunks in self._decoded(file, base):
            for chunk in _hashing(sha256, chunks):
                on_bytes(chunk.size)
        return file.model_copy(update={"sha256": sha256.hexdigest()})

    def _hash(self, file: DeltaFile) -> hashlib._Hash:
        header = self.headers[file.name]
        return hashlib.sha256(len(header).to_bytes(8, "little") + header)

    def _decoded(self, file: DeltaFile, base: Path | None) -> Iterator[tuple[str, Tensor, Iterator[Bytes]]]:
        differences = self._base_tensors(base)
        for name, tensor in self.tensors[file.name].items():
            yield name, tensor, decoded(self.stored[name], tensor, *self.how[name], differences.get(name))

    def _base_tensors(self, base: Path | None) -> Mapping[str, Tensor]:
        if not self.delta.needs_base:
            return {}
        if base is None:
            raise SourceError(f"{self.folder} holds differences from a base model, which is needed to restore it")
        found = read_weights(base)[0]
        needed = [name for name, (coding, _) in self.how.items() if coding in ON_BASE]
        for name in needed:
            if name not in found or found[name].shape != self.table[name].shape:
                raise SourceError(f"{base} is not the base of {self.folder}: {name} is missing or of another shape")
        return {name: found[name] for name in needed}


def restore(folder: Path, base: Path | None, out: Path, *, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write the expert's files into the existing folder `out`: what the delta restores, and copies of the others.

    Args:
        on_bytes: called with the bytes of each step.

    Raises:
        SourceError: see `OpenDelta`.
        DiskFull: not enough free space.
    """
    opened = OpenDelta.open(folder)
    require_free(out, opened.size_bytes)
    for file in opened.delta.files:
        with (out / file.name).open("wb") as written:
            header = opened.headers[file.name]
            written.write(len(header).to_bytes(8, "little") + header)
            for _, _, chunks in opened.file_values(file, base):
                for chunk in chunks:
                    written.write(chunk.data)
                    on_bytes(chunk.size)
    copy_other_files(folder, out)


def copy_other_files(folder: Path, out: Path) -> None:
    """Copy what is not weights and not the manifest: configs, tokenizer, templates, cards; no links, no subfolders
    but those of the digest.
    """
    from registry.digest import digest_files

    others = [file for file in digest_files(folder) if file.suffix != ".safetensors"]
    cards = [file for file in folder.iterdir() if file.suffix in (".md", ".txt") or file.name in ("LICENSE", "NOTICE")]
    for file in {*others, *(card for card in cards if card.is_file() and not card.is_symlink())}:
        if file.name not in _NOT_COPIED:
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _hashing(sha256: hashlib._Hash, chunks: Iterator[Bytes]) -> Iterator[Bytes]:
    for chunk in chunks:
        sha256.update(chunk.data)
        yield chunk


def decoded(stored: Tensor, tensor: Tensor, coding: Coding, scale: float, base: Tensor | None) -> Iterator[Bytes]:
    """The bytes of a tensor, in chunks.

    Args:
        stored: its coded form; see `manifest.TENSORS`.
        base: the base's tensor of the same shape, for codings ON_BASE.

    Raises:
        SourceError: the coded form is damaged.
    """
    chunks = chunks_of(tensor)
    lengths, at = _lengths(stored, len(chunks)), 4 * len(chunks)
    for (first, count), length in zip(chunks, lengths, strict=True):
        data = read_bytes(stored, at, length).data
        at += length
        if coding in ON_BASE:
            assert base is not None  # OpenDelta found it
            yield _on_base(data, tensor, coding, scale, base, first, count)
        elif coding == "whole":
            item = ITEM_BYTES[tensor.dtype]
            yield decode_planes(data, count * item, item)
        else:
            yield _scaled(data, tensor, scale, count)


def _lengths(stored: Tensor, n_chunks: int) -> list[int]:
    lengths: list[int] = read_bytes(stored, 0, 4 * n_chunks).view("<u4").tolist()
    return lengths


def _places(folder: Path, payload: Mapping[str, Tensor], tensors: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Where the coded form of each tensor is. Raises SourceError if they are not what the file holds."""
    whole = payload.get(TENSORS)
    if whole is None or whole.dtype != "U8":
        raise SourceError(f"{folder / PAYLOAD} has no coded tensors; copy it again")
    places, at = {}, 0
    for name, tensor in tensors:
        size = 4 * len(chunks_of(tensor))
        if at + size <= whole.n_bytes:  # else too short: found by the comparison below
            size += sum(_lengths(_part(whole, at, size), size // 4))
        places[name] = _part(whole, at, size)
        at += size
        if at > whole.n_bytes:
            break
    if at != whole.n_bytes:
        raise SourceError(f"{folder / PAYLOAD} is damaged: the coded tensors do not fill it; copy it again")
    return places


def _part(whole: Tensor, start: int, size: int) -> Tensor:
    return Tensor((size,), size, whole.dtype, whole.file, whole.start + start)


def _on_base(
    data: memoryview, tensor: Tensor, coding: Coding, scale: float, base: Tensor, first: int, count: int
) -> Bytes:
    item, base_item = ITEM_BYTES[tensor.dtype], ITEM_BYTES.get(base.dtype, 0)
    if coding == "xor":
        if base.dtype != tensor.dtype:
            raise SourceError(f"{base.file} is not the base: it has {base.dtype} where {tensor.dtype} is expected")
        return decode_planes(data, count * item, item) ^ read_bytes(base, first * item, count * item)
    if not (is_float(tensor) and is_float(base)):
        raise SourceError(f"signs are added to {base.dtype} for {tensor.dtype}, which are not both floats")
    raw = read_bytes(base, first * base_item, count * base_item)
    positions, signs = decode_signs(data, count)
    return added(raw, base.dtype, tensor.dtype, positions, signs * np.float32(scale))


def added(
    raw: Bytes, base_dtype: str, dtype: str, positions: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    steps: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> Bytes:  # fmt: skip
    """The bytes of base values with `steps` added at `positions`; of the same type, all others keep their bits."""
    values = to_values(raw, base_dtype)
    if base_dtype != dtype:
        values = values.copy()
        values[positions] += steps
        return to_bytes(values, dtype)
    changed = to_bytes(values[positions] + steps, dtype).reshape(-1, ITEM_BYTES[dtype])
    raw.reshape(-1, ITEM_BYTES[dtype])[positions] = changed
    return raw


def _scaled(data: memoryview, tensor: Tensor, scale: float, count: int) -> Bytes:
    if not is_float(tensor):
        raise SourceError(f"a tensor of the type {tensor.dtype} is stored as signs, which are of floats")
    values = np.zeros(count, np.float32)
    positions, signs = decode_signs(data, count)
    values[positions] = signs * np.float32(scale)
    return to_bytes(values, tensor.dtype)


def _header(folder: Path, payload: Mapping[str, Tensor], file: DeltaFile) -> bytes:
    found = payload.get(header_name(file.name))
    if found is None or found.dtype != "U8" or found.n_bytes > 2 * MOST_HEADER_BYTES:
        raise SourceError(f"{folder / PAYLOAD} has no header of {file.name}, or one that is too large; copy it again")
    return decode_planes(read_bytes(found).data, file.header_bytes, 1).tobytes()
