"""The input file: scanned once, cut into splits, and read split by split. No process holds more than a split.

The scan keeps digests, with which what is read later is compared (`checked_file`): no run has rows of two files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coe.batch.checked_file import Digests, changed, opened_as_scanned
from coe.batch.errors import InputError
from coe.runs.storage import absolute, open_file

_BLOCK_BYTES = 8 * 2**20
_SPLIT_BYTES = 16 * 2**20
"""Largest split of JSONL, whatever its lines: it bounds what a process reads at once."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")
_SMALLEST_PART, _PARTS = 64, 128
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Split:
    """Consecutive rows, which become one part.

    Attributes:
        part: its number, in the order of the input.
        line: number of its first line (JSONL) or row (Parquet), from 1.
        rows: lines, blank ones included, or rows.
        start, length: bytes of the file (JSONL); for Parquet the first row within the row group, and 0.
        group: row group of a Parquet file.
    """

    part: int
    line: int
    rows: int
    start: int
    length: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """An input file as it was scanned. `sha256`: of its bytes. `digests`: of its blocks, one after the other."""

    url: str
    format: Literal["jsonl", "parquet"]
    sha256: str
    size_bytes: int
    rows: int
    splits: tuple[Split, ...]
    digests: bytes = b""

    def manifest(self) -> dict[str, Any]:
        """The fields that must be the same when a run is resumed."""
        return {key: value for key, value in asdict(self).items() if key not in ("splits", "digests")}


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before parsing: the bytes of a JSONL line, or the fields of a Parquet row."""

    number: int
    content: bytes | dict[str, Any]


def scan(url: str, part_rows: int) -> Source:
    """Hash and cut an input file, in one pass.

    Args:
        part_rows: most rows of a split; there are fewer in a small file, so that it has parts to be resumed by.

    Raises:
        InputError: there is no such file, it is empty, compressed, or broken Parquet.
    """
    if url.endswith(_COMPRESSED):
        raise InputError(f"{url}: is compressed, and compressed files cannot be read in parts: decompress it first")
    url = absolute(url)
    try:
        with open_file(url) as file:
            return _scan_parquet(url, file, part_rows) if _is_parquet(file) else _scan_jsonl(url, file, part_rows)
    except IsADirectoryError:
        raise InputError(f"{url}: is a folder; name a file") from None
    except FileNotFoundError:
        raise InputError(f"{url}: there is no such file") from None
    except PermissionError as error:
        raise InputError(f"{url}: may not be read: {error}") from error


def read(source: Source, splits: Sequence[Split]) -> Iterator[tuple[Split, list[RawRow]]]:
    """The lines of each split, one split after the other; blank lines are left out.

    The splits of a Parquet row group are cheapest read together: it is decoded from its start.

    Raises:
        InputError: the file is gone, or is not the one that was scanned.
    """
    try:
        with open_file(source.url) as opened:
            file = opened_as_scanned(opened, source.url, source.size_bytes, source.digests)
            if source.format == "parquet":
                yield from _read_parquet(file, splits)
                return
            for split in splits:
                file.seek(split.start)
                yield split, list(_lines(file.read(split.length), split.line))
    except FileNotFoundError as error:
        raise changed(source.url) from error


def read_together(source: Source) -> list[tuple[Split, ...]]:
    """Bundles of splits that one task should read."""
    if source.format == "jsonl":
        return [(split,) for split in source.splits]
    groups: dict[int, list[Split]] = {}
    for split in source.splits:
        groups.setdefault(split.group, []).append(split)
    return [tuple(group) for group in groups.values()]


def rows_per_part(rows: int, most: int) -> int:
    """`most` for large inputs; fewer for small ones, so that an interrupted run keeps some finished parts."""
    return min(most, max(_SMALLEST_PART, -(-rows // _PARTS)))


def _is_parquet(file: IO[bytes]) -> bool:
    magic = file.read(4)
    file.seek(0)
    return magic == b"PAR1"


def _scan_jsonl(url: str, file: IO[bytes], part_rows: int) -> Source:
    """Finds line ends block by block, and keeps every 64th."""
    digests, size, lines = Digests(), 0, 0
    marks = [0]  # byte offsets of lines 0, 64, 128, ...
    last = b"\n"
    while block := file.read(_BLOCK_BYTES):
        digests.add(block)
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A)
        first = -lines % _SMALLEST_PART  # ends to skip until `lines` is a multiple of 64 again
        first = (first - 1) % _SMALLEST_PART
        marks += (ends[first::_SMALLEST_PART] + size + 1).tolist()
        lines += len(ends)
        size += len(block)
        last = block[-1:]
    lines += last != b"\n"
    if not size:
        raise InputError(f"{url}: is empty")
    splits = tuple(_jsonl_splits(marks, lines, size, rows_per_part(lines, part_rows)))
    return Source(url, "jsonl", digests.of_file(), size, lines, splits, digests.of_blocks())


def _jsonl_splits(marks: list[int], lines: int, size: int, part_rows: int) -> Iterator[Split]:
    step = max(1, part_rows // _SMALLEST_PART)  # marks a split spans at most
    ends = [*(mark for mark in marks[1:] if mark < size), size]
    start, begun, part = 0, 0, 0
    for mark, end in enumerate(ends, start=1):
        following = ends[mark] if mark < len(ends) else None
        if following is None or mark - begun >= step or following - start > _SPLIT_BYTES:
            first, until = begun * _SMALLEST_PART, min(mark * _SMALLEST_PART, lines)
            yield Split(part, first + 1, until - first, start, end - start)
            start, begun, part = end, mark, part + 1


def _lines(content: bytes, first: int) -> Iterator[RawRow]:
    pieces = content.split(b"\n")
    for number, piece in enumerate(pieces, start=first):
        text = piece.removeprefix(_BOM) if number == 1 else piece
        if text.strip():
            yield RawRow(number, text)


def _scan_parquet(url: str, file: IO[bytes], part_rows: int) -> Source:
    digests = Digests()
    while block := file.read(_BLOCK_BYTES):
        digests.add(block)
    blocks = digests.of_blocks()
    try:
        metadata = pq.ParquetFile(opened_as_scanned(file, url, digests.size, blocks)).metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: is not a whole Parquet file: {error}") from error
    if not metadata.num_rows:
        raise InputError(f"{url}: has no rows")
    splits: list[Split] = []
    line, most = 1, rows_per_part(metadata.num_rows, part_rows)
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for start in range(0, rows, most):
            splits.append(Split(len(splits), line + start, min(most, rows - start), start, group=group))
        line += rows
    return Source(url, "parquet", digests.of_file(), digests.size, metadata.num_rows, tuple(splits), blocks)


def _read_parquet(file: IO[bytes], splits: Sequence[Split]) -> Iterator[tuple[Split, list[RawRow]]]:
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK_BYTES)
    group, at = -1, 0
    rows: Iterator[dict[str, Any]] = iter(())
    for split in splits:
        if split.group != group or split.start < at:
            group, at = split.group, 0
            rows = _records(parquet.iter_batches(batch_size=split.rows, row_groups=[group]))
        next(islice(rows, split.start - at, split.start - at), None)
        found = list(islice(rows, split.rows))
        at = split.start + split.rows
        yield split, [RawRow(split.line + i, row) for i, row in enumerate(found)]


def _records(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()
