"""Files of outcome tables: Parquet, JSONL and CSV to and from a pandas frame, and its columns to those of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from registry.json_text import loads
from registry.storage import atomic_path
from routers.conversation import main_text
from routers.errors import InvalidOutcomes
from routers.outcomes import conversations
from routers.outcomes.cells import WrittenFloat, is_missing, numbers, rows_problem, texts, unicode_problems
from routers.outcomes.csv_files import read_csv, refuse_duplicates, write_csv

if TYPE_CHECKING:
    import pandas as pd

_SCORE, _COST, _TOKENS, _ANSWER = "score::", "cost::", "tokens::", "answer::"
_MOST_FOLD = 2**31
_OWN_COLUMNS = ("query_id", "prompt", "domain", "fold", conversations.COLUMN)


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
        raise InvalidOutcomes("is not a regular file" if path.exists() else "no such file", source=str(path))
    return readers[path.suffix](path)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write the rows atomically, in the format of the suffix.

    Raises:
        InvalidOutcomes: the suffix is not `.parquet`, `.jsonl` or `.csv`, or the format cannot hold a value.
    """
    if path.suffix not in {".parquet", ".jsonl", ".csv"}:
        raise InvalidOutcomes(f"cannot write {path.suffix!r}: use .parquet, .jsonl or .csv", source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        try:
            _write(frame, temporary, path.suffix)
        except (ValueError, TypeError) as error:  # Arrow's are both; half of a surrogate pair is a ValueError
            raise InvalidOutcomes(f"cannot be written: {error}", source=str(path)) from error


def _write(frame: pd.DataFrame, temporary: Path, suffix: str) -> None:
    if suffix == ".parquet":
        frame.to_parquet(temporary, compression="zstd", index=False)
    elif suffix == ".csv":
        write_csv(frame, temporary)
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
        refuse_duplicates(table.column_names, path)
        frame: pd.DataFrame = table.to_pandas(integer_object_nulls=True)  # floats would round large integers
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidOutcomes(f"damaged or not Parquet: {error}", source=str(path)) from error
    return frame


def _read_jsonl(path: Path) -> pd.DataFrame:
    import pandas as pd

    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = loads(line, object_pairs_hook=_unique_keys, parse_float=WrittenFloat)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        except RecursionError:
            problems.append(f"line {number}: nested too deeply")
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            problems.append(f"line {number}: expected a JSON object, got {type(record).__name__}")
    if problems:
        raise InvalidOutcomes(*problems, source=str(path))
    names = dict.fromkeys(name for record in records for name in record)
    cells = {name: [record.get(name) for record in records] for name in names}
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in cells.items()})


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
    if unicode_problems(record, "key"):
        raise ValueError("a key has half of a surrogate pair, which is no valid Unicode")
    return record


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
    talks = conversations.conversations_of(frame, problems)
    columns = {
        "query_ids": _texts(frame, "query_id", problems) or tuple(map(str, range(len(frame)))),
        "prompts": _prompts(frame, talks, problems),
        "conversations": talks,
        "experts": tuple(experts),
        "scores": groups[_SCORE] if experts else np.empty((len(frame), 0)),
        "costs_usd": groups[_COST],
        "tokens": groups[_TOKENS],
        "domains": _texts(frame, "domain", problems) if _has_values(frame, "domain") else None,
        "folds": _folds(frame, problems) if _has_values(frame, "fold") else None,
        "answers": {name.removeprefix(_ANSWER): texts(frame[name], name, problems) for name in answers} or None,
        "frame": _plain_columns(frame[others]) if others else None,
    }
    problems += [problem for name in others for problem in _broken_text(frame[name], name)]
    return columns, problems


def frame_of(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Inverse of `columns_of`: a frame from the arguments of `OutcomeTable`."""
    import pandas as pd

    own: dict[str, Any] = {"query_id": columns["query_ids"]}
    if columns["domains"] is not None:
        own["domain"] = columns["domains"]
    own["prompt"] = columns["prompts"]
    if columns["conversations"] is not None:
        own[conversations.COLUMN] = conversations.cells_of(columns["conversations"])
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


def _plain_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns, those of one type of number as such; mixed ones stay objects, so that no value is altered."""
    import pandas as pd

    columns = {str(name): _plain_column(column) for name, column in frame.items()}
    return pd.DataFrame({name: column.reset_index(drop=True) for name, column in columns.items()})


def _broken_text(column: pd.Series[Any], name: str) -> list[str]:
    return unicode_problems(column, name) if column.dtype.kind == "O" else []


def _plain_column(column: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    if column.dtype != object:
        return column
    cells = pd.Series([float(c) if isinstance(c, WrittenFloat) else c for c in column], dtype=object)
    types = {type(cell) for cell in cells}
    return cells.infer_objects() if types in ({int}, {float}, {bool}) else cells


def _has_values(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _texts(frame: pd.DataFrame, name: str, problems: list[str]) -> tuple[str, ...] | None:
    if name not in frame:
        problems.append(f"there is no column {name!r}")
        return None
    if problem := rows_problem(f"column {name!r} is empty", frame[name].isna().to_numpy()):
        problems.append(problem)
        return None
    return texts(frame[name], name, problems)


def _prompts(
    frame: pd.DataFrame, talks: tuple[conversations.Conversation, ...] | None, problems: list[str]
) -> tuple[str, ...]:
    """The prompts; that of a conversation is derived from its messages, whatever the file says."""
    if talks is None:
        return _texts(frame, "prompt", problems) or ("",) * len(frame)
    derived = [main_text(messages) if messages else None for messages in talks]
    stated = frame["prompt"] if "prompt" in frame else [None] * len(frame)
    cells = [text if text is not None else cell for text, cell in zip(derived, stated, strict=True)]
    missing = np.array([is_missing(cell) for cell in cells], dtype=bool)
    if problem := rows_problem("neither `prompt` nor `messages` is given", missing):
        problems.append(problem)
    return texts(cells, "prompt", problems)


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
    if not experts:
        return None
    return np.column_stack([numbers(frame[prefix + name], prefix + name, problems) for name in experts])


def _folds(frame: pd.DataFrame, problems: list[str]) -> NDArray[Any] | None:
    before = len(problems)
    values = numbers(frame["fold"], "fold", problems)
    whole = (values == np.floor(values)) & (np.abs(values) < _MOST_FOLD)
    if problem := rows_problem("column 'fold' is not a whole number", ~whole):
        problems.append(problem)
    return values.astype(np.int64) if len(problems) == before else None
