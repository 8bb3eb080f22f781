"""Files of outcome tables: Parquet, JSONL and CSV to and from a pandas frame, and its columns to those of a table."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from registry.storage import atomic_path
from routers.errors import InvalidOutcomes

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS = 5
"""The most rows that one problem lists."""
_SCORE, _COST, _TOKENS, _ANSWER = "score::", "cost::", "tokens::", "answer::"
_OWN_COLUMNS = ("query_id", "prompt", "domain", "fold")


def read_frame(path: Path) -> pd.DataFrame:
    """The rows of a `.parquet`, `.jsonl` or `.csv` file; only duplicate columns are checked.

    Raises:
        InvalidOutcomes: the file does not exist, has an unknown suffix, or cannot be read.
    """
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".csv": read_csv,
    }
    if path.suffix not in readers:
        raise InvalidOutcomes(f"unknown file format {path.suffix!r}: use {', '.join(readers)}", source=str(path))
    if not path.is_file():
        raise InvalidOutcomes("no such file", source=str(path))
    return readers[path.suffix](path)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write the rows atomically, in the format of the suffix.

    Raises:
        InvalidOutcomes: the suffix is not `.parquet`, `.jsonl` or `.csv`.
    """
    if path.suffix not in {".parquet", ".jsonl", ".csv"}:
        raise InvalidOutcomes(f"cannot write {path.suffix!r}: use .parquet, .jsonl or .csv", source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, compression="zstd", index=False)
        elif path.suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            temporary.write_text("".join(_json_lines(frame)), encoding="utf-8")


def _json_lines(frame: pd.DataFrame) -> Iterator[str]:
    for record in frame.astype(object).where(frame.notna(), None).to_dict(orient="records"):
        yield json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not as a dataset, which would add columns for folders named like `key=value`.
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise InvalidOutcomes(f"damaged or not Parquet: {error}", source=str(path)) from error
    _refuse_duplicates(table.column_names, path)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _read_jsonl(path: Path) -> pd.DataFrame:
    import pandas as pd

    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unique_keys)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            problems.append(f"line {number}: expected a JSON object, got {type(record).__name__}")
    if problems:
        raise InvalidOutcomes(*problems, source=str(path))
    return pd.DataFrame.from_records(records)


def read_csv(path: Path) -> pd.DataFrame:
    """The rows of a CSV file: cells are text (`NA` or `007` stay unchanged), empty cells are missing."""
    import pandas as pd

    header = next(csv.reader(io.StringIO(_text(path), newline="")), None)
    if header is None:
        raise InvalidOutcomes("the file is empty", source=str(path))
    _refuse_duplicates(header, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header would be cut
            return pd.read_csv(
                path, dtype=str, keep_default_na=False, na_values=[""], index_col=False, encoding="utf-8-sig"
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InvalidOutcomes(f"not a CSV file: {str(error).strip()}", source=str(path)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOutcomes(f"cannot be read as UTF-8 text: {error}", source=str(path)) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return record


def _refuse_duplicates(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidOutcomes(*(f"duplicate column {name!r}" for name in twice), source=str(path))


def rows_problem(what: str, bad: NDArray[np.bool_]) -> str | None:
    """`what` with the first few bad rows, counted from 1; `None` if no row is bad."""
    rows = np.flatnonzero(bad) + 1
    if not len(rows):
        return None
    shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
    return f"{what} in {len(rows)} row{'s' * (len(rows) > 1)}: {shown}"


def columns_of(frame: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `OutcomeTable` in a frame, and the problems of its columns.

    Missing columns are filled with values that raise no further problem, so that all problems are reported at once.
    """
    problems: list[str] = []
    experts = [name.removeprefix(_SCORE) for name in _names(frame) if name.startswith(_SCORE)]
    groups = {prefix: _group(frame, prefix, experts, problems) for prefix in (_SCORE, _COST, _TOKENS)}
    answers = [name for name in _names(frame) if name.startswith(_ANSWER)]
    taken = {*_OWN_COLUMNS, *answers, *(prefix + m for prefix in groups for m in experts)}
    others = [name for name in _names(frame) if name not in taken]
    columns = {
        "query_ids": _texts(frame, "query_id", problems) or tuple(map(str, range(len(frame)))),
        "prompts": _texts(frame, "prompt", problems) or ("",) * len(frame),
        "experts": tuple(experts),
        "scores": groups[_SCORE] if experts else np.empty((len(frame), 0)),
        "costs_usd": groups[_COST],
        "tokens": groups[_TOKENS],
        "domains": _texts(frame, "domain", problems) if _has_values(frame, "domain") else None,
        "folds": _folds(frame, problems) if _has_values(frame, "fold") else None,
        "answers": {name.removeprefix(_ANSWER): tuple(map(str, frame[name].fillna(""))) for name in answers} or None,
        "frame": frame[others].reset_index(drop=True) if others else None,
    }
    return columns, problems


def frame_of(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Inverse of `columns_of`: a frame from the arguments of `OutcomeTable`."""
    import pandas as pd

    own: dict[str, Any] = {"query_id": columns["query_ids"]}
    if columns["domains"] is not None:
        own["domain"] = columns["domains"]
    own["prompt"] = columns["prompts"]
    for prefix, name in ((_SCORE, "scores"), (_COST, "costs_usd"), (_TOKENS, "tokens")):
        if (array := columns[name]) is not None:
            own |= {prefix + expert: array[:, column] for column, expert in enumerate(columns["experts"])}
    own |= {_ANSWER + expert: values for expert, values in (columns["answers"] or {}).items()}
    if columns["folds"] is not None:
        own["fold"] = columns["folds"]
    frame, others = pd.DataFrame(own), columns["frame"]
    return frame if others is None else pd.concat([frame, others.reset_index(drop=True)], axis=1)


def _names(frame: pd.DataFrame) -> list[str]:
    return list(map(str, frame.columns))


def _has_values(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _texts(frame: pd.DataFrame, name: str, problems: list[str]) -> tuple[str, ...] | None:
    if name not in frame:
        problems.append(f"there is no column {name!r}")
        return None
    if problem := rows_problem(f"column {name!r} is empty", frame[name].isna().to_numpy()):
        problems.append(problem)
        return None
    return tuple(map(str, frame[name]))


def _group(frame: pd.DataFrame, prefix: str, experts: list[str], problems: list[str]) -> NDArray[Any] | None:
    """(n, m) float64 of the columns `prefix + expert`, or None if there are none."""
    named = {name.removeprefix(prefix) for name in _names(frame) if name.startswith(prefix)}
    if not named:
        return None
    problems += [
        f"column {prefix + name!r} has no matching column {_SCORE + name!r}" for name in sorted(named - set(experts))
    ]
    missing = [name for name in experts if name not in named]
    if missing:
        problems.append(f"only some experts have a {prefix} column; without one: {', '.join(missing)}")
        return None
    return np.column_stack([_numbers(frame, prefix + name, problems) for name in experts]) if experts else None


def _numbers(frame: pd.DataFrame, name: str, problems: list[str]) -> NDArray[Any]:
    import pandas as pd

    values = np.array(pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan))
    unread = (
        np.isnan(values) & frame[name].notna().to_numpy() & (frame[name].astype(str).str.lower() != "nan").to_numpy()
    )
    if problem := rows_problem(f"column {name!r} is not a number", unread):
        problems.append(problem)
        values[unread] = 0.0  # reported once is enough
    return values


def _folds(frame: pd.DataFrame, problems: list[str]) -> NDArray[Any] | None:
    before = len(problems)
    values = _numbers(frame, "fold", problems)
    if problem := rows_problem("column 'fold' is not a whole number", ~(values == np.floor(values))):
        problems.append(problem)
    return values.astype(np.int64) if len(problems) == before else None
