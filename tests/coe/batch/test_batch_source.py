"""The input: splits that together hold every line once, with its number."""

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coe.batch import checked_file
from coe.batch import source as module
from coe.batch.errors import InputError
from coe.batch.source import RawRow, Source, read, read_together, rows_per_part, scan


def lines_of(source: Source) -> list[RawRow]:
    return [line for bundle in read_together(source) for _, lines in read(source, bundle) for line in lines]


@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
@pytest.mark.parametrize("n_lines", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
def test_every_line_is_read_once_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_lines: int, block_bytes: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    rng = random.Random(n_lines)
    pieces = [b"x" * rng.choice([0, 1, 5, 30]) for _ in range(n_lines - 1)] + [b"last"]
    for end in (b"", b"\n"):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(pieces) + end)
        source = scan(str(path), part_rows=100)
        assert lines_of(source) == [RawRow(i, piece) for i, piece in enumerate(pieces, start=1) if piece]
        assert source.rows == n_lines and [split.part for split in source.splits] == [*range(len(source.splits))]


def test_splits_hold_few_rows_in_small_files_and_few_bytes_in_wide_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [rows_per_part(n, 4096) for n in (1, 1000, 128_000, 10**6, 10**9)] == [64, 64, 1000, 4096, 4096]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x\n" * 1000)
    assert {split.rows for split in scan(str(path), 4096).splits} == {64, 1000 % 64}
    assert {split.rows for split in scan(str(path), 128).splits} == {64, 1000 % 64}
    path.write_bytes(b"x\n" * 64_000)
    assert max(split.rows for split in scan(str(path), 4096).splits) == 448  # whole steps of 64 within 500
    monkeypatch.setattr(module, "_SPLIT_BYTES", 200)
    assert max(split.length for split in scan(str(path), 4096).splits) <= 200


def test_a_file_is_known_by_its_content_not_by_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text('{"prompt": "x"}\n')
    a, b = scan(str(tmp_path / "a"), 64), scan((tmp_path / "b").as_uri(), 64)
    assert (a.sha256, a.splits, a.size_bytes) == (b.sha256, b.splits, b.size_bytes)
    assert a.manifest()["url"] == str(tmp_path / "a") and "splits" not in a.manifest()
    (tmp_path / "b").write_text('{"prompt": "y"}\n')
    assert scan(str(tmp_path / "b"), 64).sha256 != a.sha256


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n')
    assert lines_of(scan(str(tmp_path / "rows"), 64)) == [RawRow(1, b'{"prompt": "x"}')]


def test_parquet_rows_come_by_row_group_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"p{i}" for i in range(500)], "max_tokens": pa.array([None] * 500, pa.int32())})
    pq.write_table(table, path, row_group_size=200)
    source = scan(str(path), part_rows=64)
    assert (source.format, source.rows) == ("parquet", 500)
    assert [split.rows for split in source.splits] == [64, 64, 64, 8, 64, 64, 64, 8, 64, 36]
    expected = [RawRow(i + 1, {"prompt": f"p{i}", "max_tokens": None}) for i in range(500)]
    assert lines_of(source) == expected
    some = [source.splits[i] for i in (9, 1, 3)]  # remains of an interrupted run, in any order
    assert [lines for _, lines in read(source, some)] == [
        expected[split.line - 1 : split.line - 1 + split.rows] for split in some
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl.gz", b"x", "decompress it first"),
        ("rows.parquet", b"PAR1 and then nonsense", "not a whole Parquet file"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        scan(str(tmp_path / name), 64)


def test_missing_files_folders_and_empty_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        scan(str(tmp_path / "nothing"), 64)
    with pytest.raises(InputError, match="is a folder"):
        scan(str(tmp_path), 64)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="has no rows"):
        scan(str(tmp_path / "none.parquet"), 64)


def test_a_file_that_shrank_since_it_was_scanned_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"x\n" * 200)
    source = scan(str(path), 64)
    path.write_bytes(b"x\n")
    with pytest.raises(InputError, match="changed while it was read"):
        lines_of(source)
    path.unlink()
    with pytest.raises(InputError, match="changed while it was read"):
        lines_of(source)


def test_a_file_that_is_rewritten_at_equal_length_is_an_error_where_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_file, "_BLOCK_BYTES", 256)
    path = tmp_path / "rows"
    content = b"".join(b"row %03d\n" % i for i in range(200))  # 1,600 bytes: the last block is short
    path.write_bytes(content)
    source = scan(str(path), 64)
    path.write_bytes(content[:-2] + b"X\n")
    *sound, last = read_together(source)
    assert [line.number for bundle in sound for _, lines in read(source, bundle) for line in lines] == [*range(1, 193)]
    with pytest.raises(InputError, match=f"{path}: changed while it was read.*--resume.*another --out"):
        list(read(source, last))
    path.write_bytes(content + b"more\n")  # rows that were not scanned belong to no split
    assert len(lines_of(source)) == 200


def test_a_parquet_file_that_is_rewritten_at_equal_length_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for word in ("one", "two"):
        before = path.read_bytes() if path.exists() else b""
        pq.write_table(pa.table({"prompt": [f"{word} {i}" for i in range(100)]}), path, row_group_size=50)
        if word == "one":
            source = scan(str(path), 64)
            assert len(lines_of(source)) == 100
    assert len(before) == path.stat().st_size
    with pytest.raises(InputError, match="changed while it was read"):
        lines_of(source)


@pytest.mark.parametrize("chunk", [1, 7, 256, 1000])
def test_the_digests_of_blocks_do_not_depend_on_how_a_file_is_read(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(checked_file, "_BLOCK_BYTES", 256)
    content = random.Random(0).randbytes(1000)
    digests, whole = checked_file.Digests(), checked_file.Digests()
    for start in range(0, len(content), chunk):
        digests.add(content[start : start + chunk])
    whole.add(content)
    assert (digests.of_blocks(), digests.of_file(), digests.size) == (whole.of_blocks(), whole.of_file(), 1000)
    file = checked_file.opened_as_scanned(io.BytesIO(content), "x", digests.size, digests.of_blocks())
    assert file.read() == content and file.seek(-300, io.SEEK_END) == 700 and file.read(10) == content[700:710]
