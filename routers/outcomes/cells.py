"""Cells of outcome tables: values of any file format to the text or number that was written, or a problem with its row.

A value is never altered in silence: an integer of 17 digits keeps all of them beside empty cells, a number among texts
keeps its spelling, and what is neither text nor a number is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS = 5
"""The most rows that one problem lists."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class WrittenFloat(float):
    """A number of a JSON file that is not an integer, with its spelling: as text it is `1e3`, not `1000.0`."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """From the text of the number."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def rows_problem(what: str, bad: NDArray[np.bool_]) -> str | None:
    """`what` with the first few bad rows, counted from 1; `None` if no row is bad."""
    rows = np.flatnonzero(bad) + 1
    if not len(rows):
        return None
    shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
    return f"{what} in {len(rows)} row{'s' * (len(rows) > 1)}: {shown}"


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: `None`, NaN, NaT or pandas' NA. Text is never missing, not even "NaN"."""
    import pandas as pd

    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def texts(values: Iterable[Any], name: str, problems: list[str]) -> tuple[str, ...]:
    """Cells as text, "" where one is missing. A list, an object, bytes or a boolean is a problem of its row."""
    cells = ["" if is_missing(value) else _text(value) for value in values]
    refused = np.array([cell is None for cell in cells], dtype=bool)
    if problem := rows_problem(f"column {name!r} is not text or a number", refused):
        problems.append(problem)
    found = tuple(cell or "" for cell in cells)
    problems += unicode_problems(found, name)
    return found


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | np.bool_ | complex):
        return None
    if isinstance(value, Real | Decimal | np.datetime64) or hasattr(value, "isoformat"):
        return str(value)
    return None


def numbers(column: pd.Series[Any], name: str, problems: list[str]) -> NDArray[np.float64]:
    """(n,) cells as numbers, NaN where one is missing; `true` and `false` are 1 and 0. Other text is a problem."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column.dtype):
        return np.array(column.to_numpy(dtype=np.float64, na_value=np.nan))
    cells = [_number(value) for value in column]
    found = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    values = np.array(found)
    missing = np.array([is_missing(cell) or str(cell).strip().lower() == "nan" for cell in cells], dtype=bool)
    unread = np.isnan(values) & ~missing
    if problem := rows_problem(f"column {name!r} is not a number", unread):
        problems.append(problem)
        values[unread] = 0.0  # reported once is enough
    return values


def _number(value: Any) -> Any:
    """A cell as `pandas.to_numeric` takes it: a float, text, or `None`; text that is no number for anything else."""
    if is_missing(value):
        return None
    if isinstance(value, str):
        return {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    if isinstance(value, Real | Decimal | np.bool_):
        try:
            return float(value)
        except OverflowError:
            return "too large"
    return "neither text nor a number"


def unicode_problems(values: Iterable[Any], name: str) -> list[str]:
    """The rows of a column whose text has half of a surrogate pair, which JSON can spell and no UTF-8 file can hold."""
    broken = np.array([isinstance(value, str) and _SURROGATE.search(value) is not None for value in values], dtype=bool)
    what = f"column {name!r} has half of a surrogate pair, which is no valid Unicode,"
    return [problem] if (problem := rows_problem(what, broken)) else []
