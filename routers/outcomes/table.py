"""OutcomeTable: scores and costs of n queries on m experts. The input of training and evaluation.

On disk (Parquet, JSONL or CSV) a row is a query and the columns are `query_id`, `prompt`, `score::<expert>` in [0, 1],
and if known `dataset`, `domain`, `fold`, `cost::<expert>` (USD per query), `tokens::<expert>` (output tokens) and
`answer::<expert>`. A row may hold `messages`, a conversation, in place of a prompt. Other columns are kept unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from registry.spelling import did_you_mean
from routers.base import Floats, Message, Query, Words
from routers.errors import InvalidOutcomes
from routers.outcomes.cells import SHOWN_ROWS, rows_problem
from routers.outcomes.files import columns_of, frame_of, read_frame, write_frame

if TYPE_CHECKING:
    import pandas as pd

    from registry.spec import Price

NOMINAL_TOKENS = 500
"""Prompt tokens, and generated tokens, assumed per query if the table has no token counts."""
CHARS_PER_TOKEN = 4
"""Characters per prompt token, used if the table has no `prompt_tokens` column."""


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """n queries x m experts, checked on construction; all problems are reported at once.

    Attributes:
        query_ids: n unique ids.
        prompts: n texts that routers are trained on; of a conversation, the user turn that weighs most.
        experts: m unique names, the columns of every (n, m) array.
        scores: (n, m) float64 in [0, 1].
        costs_usd: (n, m) float64 >= 0, USD per query, or `None` if unknown.
        frame: (n, ...) the other columns, or `None`.
        tokens: (n, m) float64 >= 0, output tokens, or `None`.
        domains: n category names, or `None`.
        folds: (n,) int64, the cross-validation fold of each row, or `None`.
        answers: expert -> n recorded answers ("" if unreadable), or `None`.
        conversations: n tuples of messages, empty where a row is a prompt alone; or `None`.
        features: name -> (n, d) signals of the queries, or n tuples of words, for routers that require them
            (`Router.requires`); computed later, not part of the file.

    Raises:
        InvalidOutcomes: lists all faulty rows and columns. Rows count from 1.
    """

    query_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    experts: tuple[str, ...]
    scores: NDArray[np.float64]
    costs_usd: NDArray[np.float64] | None = None
    frame: pd.DataFrame | None = None
    tokens: NDArray[np.float64] | None = None
    domains: tuple[str, ...] | None = None
    folds: NDArray[np.int64] | None = None
    answers: Mapping[str, tuple[str, ...]] | None = None
    conversations: tuple[tuple[Message, ...], ...] | None = None
    features: Mapping[str, Floats | Sequence[Words]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("query_ids", "prompts", "experts", "domains"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        for name in ("scores", "costs_usd", "tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else np.asarray(value, dtype=np.float64))
        if self.folds is not None:
            object.__setattr__(self, "folds", np.asarray(self.folds, dtype=np.int64))
        if problems := _problems(self):
            raise InvalidOutcomes(*problems)

    def __len__(self) -> int:
        return len(self.query_ids)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The table in a `.parquet`, `.jsonl` or `.csv` file.

        Raises:
            InvalidOutcomes: the file is missing, unreadable or truncated, or its content is invalid.
        """
        return cls.from_frame(read_frame(Path(path)), source=str(path))

    def write(self, path: Path | str) -> None:
        """Write the table atomically to a `.parquet`, `.jsonl` or `.csv` file; `read` restores it.

        Raises:
            InvalidOutcomes: another suffix, or values that the format cannot hold.
        """
        try:
            frame = self.to_frame()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise InvalidOutcomes(f"cannot be written: {error}", source=str(path)) from error
        write_frame(frame, Path(path))

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, source: str = "") -> Self:
        """A table from the columns described in the module's docstring.

        Raises:
            InvalidOutcomes: lists all problems of the frame, after `source`.
        """
        columns, problems = columns_of(frame)
        try:
            table = cls(**columns)
        except InvalidOutcomes as error:
            raise InvalidOutcomes(*problems, *error.problems, source=source) from None
        if problems:
            raise InvalidOutcomes(*problems, source=source)
        return table

    def to_frame(self) -> pd.DataFrame:
        """One row per query, with the columns described in the module's docstring."""
        return frame_of({name.name: getattr(self, name.name) for name in fields(self)})

    def select(self, rows: ArrayLike) -> Self:
        """The rows of an index array or a boolean mask of length n, in that order."""
        picked = np.arange(len(self))[np.asarray(rows)]
        return replace(
            self,
            query_ids=_take(self.query_ids, picked),
            prompts=_take(self.prompts, picked),
            scores=self.scores[picked],
            costs_usd=None if self.costs_usd is None else self.costs_usd[picked],
            frame=None if self.frame is None else self.frame.iloc[picked].reset_index(drop=True),
            tokens=None if self.tokens is None else self.tokens[picked],
            domains=None if self.domains is None else _take(self.domains, picked),
            folds=None if self.folds is None else self.folds[picked],
            answers=None if self.answers is None else {m: _take(a, picked) for m, a in self.answers.items()},
            conversations=None if self.conversations is None else tuple(self.conversations[i] for i in picked),
            features={
                name: values[picked] if isinstance(values, np.ndarray) else tuple(values[i] for i in picked)
                for name, values in self.features.items()
            },
        )

    def with_experts(self, names: Sequence[str]) -> Self:
        """The table with these experts only, in this order.

        Raises:
            InvalidOutcomes: a name is not in the table (with close matches), or is repeated.
        """
        unknown = [name for name in names if name not in self.experts]
        if unknown:
            raise InvalidOutcomes(*(_unknown("expert", name, self.experts) for name in unknown))
        columns = [self.experts.index(name) for name in names]
        return replace(
            self,
            experts=tuple(names),
            scores=self.scores[:, columns],
            costs_usd=None if self.costs_usd is None else self.costs_usd[:, columns],
            tokens=None if self.tokens is None else self.tokens[:, columns],
            answers=None if self.answers is None else {m: self.answers[m] for m in names if m in self.answers},
        )

    def queries(self) -> list[Query]:
        """The part of each row that routers read: the conversation, or the prompt and the features.

        Features are those of the prompt, so a row that has them is read by its prompt.
        """
        if self.features:
            return [
                Query.of(prompt, features={name: values[row] for name, values in self.features.items()})
                for row, prompt in enumerate(self.prompts)
            ]
        talks = self.conversations or ((),) * len(self)
        return [
            Query(messages) if messages else Query.of(prompt)
            for prompt, messages in zip(self.prompts, talks, strict=True)
        ]

    def with_prices(self, prices: Mapping[str, Price]) -> Self:
        """The table with `costs_usd` computed from prices, replacing recorded costs.

        cost = (prompt tokens * input price + generated tokens * output price) / 1e6. Generated tokens come from
        `tokens`, prompt tokens from the column `prompt_tokens`, or are a quarter of the prompt's characters. If the
        table has no `tokens`, every query counts as 500 prompt and 500 generated tokens: a constant cost per expert.

        Raises:
            InvalidOutcomes: an expert has no price.
        """
        missing = [name for name in self.experts if name not in prices]
        if missing:
            raise InvalidOutcomes(
                f"no price for {', '.join(missing)}: add it to the prices, or leave these experts out"
            )
        costs = np.empty(self.scores.shape)
        tokens_in = self._prompt_tokens()
        for column, name in enumerate(self.experts):
            tokens_out = NOMINAL_TOKENS if self.tokens is None else self.tokens[:, column]
            price = prices[name]
            costs[:, column] = (tokens_in * price.input_usd_per_mtok + tokens_out * price.output_usd_per_mtok) / 1e6
        return replace(self, costs_usd=costs)

    def _prompt_tokens(self) -> NDArray[np.float64]:
        if self.tokens is None:
            return np.full(len(self), float(NOMINAL_TOKENS))
        if self.frame is not None and "prompt_tokens" in self.frame:
            return np.asarray(self.frame["prompt_tokens"], dtype=np.float64)
        return np.array([len(prompt) / CHARS_PER_TOKEN for prompt in self.prompts])

    def labels(self, column: str = "domain") -> tuple[str, ...]:
        """The category of each query: the domains, or another column as text.

        Raises:
            InvalidOutcomes: the column does not exist (with close matches), or is empty in some rows.
        """
        if column == "domain" and self.domains is not None:
            return self.domains
        others: Mapping[Any, Any] = {} if self.frame is None else dict(self.frame.items())
        if column not in others:
            known = [*(["domain"] if self.domains is not None else []), *map(str, others)]
            raise InvalidOutcomes(_unknown("column", column, known))
        values = others[column]
        if problem := rows_problem(f"column {column!r} is empty", values.isna().to_numpy()):
            raise InvalidOutcomes(problem)
        return tuple(map(str, values))

    def training_ids_digest(self) -> str:
        """`sha256:...` over the sorted query ids: equal if two tables hold the same queries."""
        text = json.dumps(sorted(self.query_ids), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _take(values: Sequence[str], rows: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(values[i] for i in rows)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"no {what} {name!r} in the table{did_you_mean(name, names, most=3, listed=True)}"


def _problems(table: OutcomeTable) -> list[str]:
    found: list[str | None] = []
    if not table.query_ids:
        found.append("the table is empty: it has no rows")
    if not table.experts:
        found.append("the table has no experts: there is no `score::<expert>` column")
    found += [_duplicates("query id", table.query_ids, rows=True), _duplicates("expert", table.experts, rows=False)]
    found += _shape_problems(table)
    if not any(found):
        found += _value_problems(table)
    return [problem for problem in found if problem]


def _duplicates(what: str, names: Sequence[str], *, rows: bool) -> str | None:
    places: dict[str, list[int]] = {}
    for row, name in enumerate(names, start=1):
        places.setdefault(name, []).append(row)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    if not twice:
        return None
    shown = [
        f"{name!r} (rows {', '.join(map(str, where[:SHOWN_ROWS]))})" if rows else repr(name)
        for name, where in twice.items()
    ]
    more = f" and {len(shown) - SHOWN_ROWS} more" if len(shown) > SHOWN_ROWS else ""
    return f"duplicate {what}: {', '.join(shown[:SHOWN_ROWS])}{more}"


def _shape_problems(table: OutcomeTable) -> list[str]:
    n, m = len(table.query_ids), len(table.experts)
    arrays: dict[str, Any] = {"scores": table.scores, "costs_usd": table.costs_usd, "tokens": table.tokens}
    found = [
        f"{name} has shape {array.shape}, expected {(n, m)} for {n} queries and {m} experts"
        for name, array in arrays.items()
        if array is not None and array.shape != (n, m)
    ]
    lists: dict[str, Any] = {
        "prompts": table.prompts,
        "domains": table.domains,
        "folds": table.folds,
        "frame": table.frame,
        "conversations": table.conversations,
    }
    lists |= {f"features[{name!r}]": values for name, values in table.features.items()}
    lists |= {f"answers[{name!r}]": values for name, values in (table.answers or {}).items()}
    found += [
        f"{name} has {len(values)} entries for {n} queries"
        for name, values in lists.items()
        if values is not None and len(values) != n
    ]
    unknown = [name for name in table.answers or {} if name not in table.experts]
    return found + [
        f"answers of {name!r}, which has no scores: add `score::{name}`, or drop the answers" for name in unknown
    ]


def _value_problems(table: OutcomeTable) -> list[str | None]:
    found: list[str | None] = []
    for column, name in enumerate(table.experts):
        scores = table.scores[:, column]
        found.append(rows_problem(f"score::{name} is missing (NaN)", np.isnan(scores)))
        found.append(rows_problem(f"score::{name} lies outside [0, 1]", (scores < 0) | (scores > 1)))
        for label, array in (("cost", table.costs_usd), ("tokens", table.tokens)):
            if array is not None:
                values = array[:, column]
                found.append(rows_problem(f"{label}::{name} is missing or not finite", ~np.isfinite(values)))
                found.append(rows_problem(f"{label}::{name} is negative", np.isfinite(values) & (values < 0)))
    return found
