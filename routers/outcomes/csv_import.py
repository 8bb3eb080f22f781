"""Import of CSV files as outcome tables: one row per query (wide), or one row per query and expert (long)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.errors import InvalidOutcomes
from routers.outcomes.csv_files import read_csv
from routers.outcomes.table import OutcomeTable

if TYPE_CHECKING:
    import pandas as pd

_LONG = ("score", "cost", "tokens", "answer")
"""Columns of the long form with one value per expert."""


def import_csv(
    path: Path | str, *, columns: Mapping[str, str] | None = None, score_columns: Sequence[str] = (), scale: float = 1.0
) -> OutcomeTable:
    """The outcome table in a CSV file.

    Long form: the columns `query_id, expert, score`, and if known `cost, tokens, answer`; other columns (such as
    `prompt`) belong to the query and must be equal in all of its rows. A file without these columns is in wide form,
    with the columns of an outcome table. If there is no `query_id`, ids are hashes of prompts.

    Args:
        columns: name in the file -> name here, applied first: `{"question": "prompt", "gpt-4": "score::gpt-4"}`.
        score_columns: columns of scores in the wide form, each named after its expert.
        scale: the full score in the file, e.g. 100.

    Raises:
        InvalidOutcomes: lists all problems.
    """
    source, frame = str(path), read_csv(Path(path))
    renames = {**(columns or {}), **{name: f"score::{name}" for name in score_columns}}
    missing = [name for name in renames if name not in frame]
    if missing:
        found = ", ".join(map(str, frame.columns))
        raise InvalidOutcomes(*(f"no column {n!r}; the file has: {found}" for n in missing), source=source)
    frame = frame.rename(columns=renames)
    if "query_id" not in frame and "prompt" in frame:
        ids = [hashlib.sha256(str(prompt).encode()).hexdigest()[:16] for prompt in frame["prompt"]]
        frame.insert(0, "query_id", ids)
    if {"query_id", "expert", "score"} <= set(frame.columns):
        frame = _widened(frame, source)
    return OutcomeTable.from_frame(_scaled(frame, scale), source=source)


def _widened(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    values = [name for name in _LONG if name in frame]
    own = [name for name in frame.columns if name not in {*values, "expert"}]
    problems = _long_problems(frame, own)
    if problems:
        raise InvalidOutcomes(*problems, source=source)
    queries = frame[own].drop_duplicates("query_id").set_index("query_id")
    wide: list[pd.DataFrame | pd.Series[Any]] = [
        frame.pivot(index="query_id", columns="expert", values=name)
        .reindex(index=queries.index, columns=frame["expert"].unique())
        .add_prefix(f"{name}::")
        for name in values
        if frame[name].notna().any()
    ]
    return queries.join(wide).reset_index()


def _long_problems(frame: pd.DataFrame, own: list[str]) -> list[str]:
    problems = []
    unnamed = frame[["query_id", "expert"]].isna().any(axis=1)
    if unnamed.any():
        problems.append(f"query_id or expert is empty in {int(unnamed.sum())} rows")
    twice = frame[frame.duplicated(["query_id", "expert"])]
    if len(twice):
        first = twice.iloc[0]
        problems.append(
            f"{len(twice)} rows repeat a query and expert, first {first['query_id']!r} and {first['expert']!r}"
        )
    for name in own:
        counts = frame.groupby("query_id")[name].nunique(dropna=False)
        if name != "query_id" and (counts > 1).any():
            problems.append(f"column {name!r} differs between rows of one query, first {counts.idxmax()!r}")
    return problems


def _scaled(frame: pd.DataFrame, scale: float) -> pd.DataFrame:
    import pandas as pd

    if not scale > 0:
        raise InvalidOutcomes(f"the scale of scores must be > 0, got {scale}")
    if scale == 1.0:
        return frame
    scores = [name for name in frame.columns if name.startswith("score::")]
    numbers = {name: pd.to_numeric(frame[name], errors="coerce") / scale for name in scores}
    return frame.assign(**numbers)
