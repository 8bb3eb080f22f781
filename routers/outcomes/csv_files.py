"""CSV files of outcome tables: every cell is text as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.errors import InvalidOutcomes

if TYPE_CHECKING:
    import pandas as pd

_BOM = b"\xef\xbb\xbf"
_LEAST_BLOCK, _MOST_BLOCK = 2**20, 2**31 - 1
_KEEPS_EMPTY = "prompt"
"""The column whose quoted empty cells are empty text; elsewhere they are missing, as spreadsheets write them."""


def read_csv(path: Path) -> pd.DataFrame:
    """The rows of a CSV file (comma, double quotes): cells are text (`NA`, `007` and line ends in quotes are kept).

    Raises:
        InvalidOutcomes: the file is empty or not UTF-8, has duplicate columns, or a row of another length; a carriage
            return outside quotes ends a row.
    """
    import pyarrow as pa
    from pyarrow import csv

    try:
        data = path.read_bytes().removeprefix(_BOM)
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOutcomes(f"cannot be read as UTF-8 text: {error}", source=str(path)) from error
    if not data.strip():
        raise InvalidOutcomes("the file is empty", source=str(path))
    try:
        # One block: a cell may be of any length, and a block ends in no cell.
        block = csv.ReadOptions(block_size=min(max(len(data) + 1, _LEAST_BLOCK), _MOST_BLOCK), use_threads=False)
        quotes = csv.ParseOptions(newlines_in_values=True)
        names = csv.read_csv(pa.BufferReader(data), block, quotes, _as_text({})).column_names
        refuse_duplicates(names, path)
        table = csv.read_csv(pa.BufferReader(data), block, quotes, _as_text(dict.fromkeys(names, pa.string())))
    except pa.ArrowException as error:
        raise InvalidOutcomes(f"not a CSV file: {error}", source=str(path)) from error
    return _frame({name: table.column(name).to_pylist() for name in names})


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the rows. Text is quoted, so that empty text differs from a missing cell; `read_csv` restores both."""
    import pyarrow as pa
    from pyarrow import csv

    cells = {str(name): [None if _empty(cell) else _cell(cell) for cell in frame[name]] for name in frame}
    columns = {name: pa.array(values, pa.string()) for name, values in cells.items()}
    csv.write_csv(pa.table(columns), path)


def refuse_duplicates(names: list[str], path: Path) -> None:
    """Raise InvalidOutcomes where a column occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidOutcomes(*(f"duplicate column {name!r}" for name in twice), source=str(path))


def _as_text(types: dict[str, Any]) -> Any:
    from pyarrow import csv

    return csv.ConvertOptions(
        column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
    )


def _frame(columns: dict[str, list[str | None]]) -> pd.DataFrame:
    import pandas as pd

    cells = {name: values if name == _KEEPS_EMPTY else [v or None for v in values] for name, values in columns.items()}
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in cells.items()})


def _empty(cell: Any) -> bool:
    from routers.outcomes.cells import is_missing

    return is_missing(cell)


def _cell(cell: Any) -> str:
    return str(cell.tolist() if hasattr(cell, "tolist") else cell)
