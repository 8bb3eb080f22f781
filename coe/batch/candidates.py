"""Which experts may answer each row, at what price and with what estimated quality: the input of a joint assignment.

A row whose caller or policy named the expert has that one candidate, without an estimated quality: it costs, and there
is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coe.batch.budget import Budget, Prices
from coe.batch.records import RoutedRow
from coe.routing import Routed
from coe.runs.storage import Folder
from coe.types import DEFAULT_MAX_TOKENS
from registry.store import Snapshot
from routers.constraints import estimate_tokens
from routers.ranking import Ranking

_NOTE = b"coe"
_ID, _LINE = "id", "line"
_PRICE, _QUALITY = "price::", "quality::"


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The experts that may answer n rows.

    Attributes:
        experts: m names, ascending.
        price_usd: (n, m); NaN where the expert may not answer. A row that makes no call has NaN only.
        quality: (n, m) estimates; NaN where there is none.
        own: (n,) the column of the expert that the policy chooses for the row on its own; -1 for no call.
        mapped: (n,) whether the router, and no constraint, leaves the row one expert.
        first_line: (n,) the line of the first row with the same id, for a later one, which makes no call; else 0. Known
            where all parts are read.
    """

    experts: tuple[str, ...]
    price_usd: NDArray[np.float64]
    quality: NDArray[np.float64]
    own: NDArray[np.int64]
    mapped: NDArray[np.bool_]
    first_line: NDArray[np.int64]


def candidates_of(
    outcomes: Sequence[object], rows: Sequence[RoutedRow], snapshot: Snapshot, budget: Budget
) -> Candidates:
    """The candidates of n routed rows.

    Args:
        outcomes: `Routed`, or the error of a row.

    Raises:
        BudgetError: a candidate has no price.
    """
    found = [_row(outcome) if isinstance(outcome, Routed) else {} for outcome in outcomes]
    experts = tuple(sorted({name for row in found for name in row}))
    columns = {name: column for column, name in enumerate(experts)}
    quality = np.full((len(rows), len(experts)), np.nan)
    allowed = np.zeros(quality.shape, dtype=bool)
    own = np.full(len(rows), -1, dtype=np.int64)
    mapped, tokens, wanted = np.zeros(len(rows), dtype=bool), np.zeros(len(rows)), np.zeros(len(rows))
    for i, (outcome, row, names) in enumerate(zip(outcomes, rows, found, strict=True)):
        if not names or not isinstance(outcome, Routed):
            continue
        for name, estimated in names.items():
            quality[i, columns[name]], allowed[i, columns[name]] = estimated, True
        own[i] = columns[outcome.decision.experts[0]]
        mapped[i] = len(names) == 1 and outcome.inputs is not None and len(outcome.inputs.allowed) > 1
        tokens[i] = estimate_tokens(outcome.query)
        wanted[i] = (row.request.max_tokens if row.request else None) or DEFAULT_MAX_TOKENS
    prices = Prices(snapshot, budget.mean_tokens)
    usd = np.full(quality.shape, np.nan)
    for name, column in columns.items():
        mine = allowed[:, column]
        usd[mine, column] = prices.usd(name, tokens[mine], wanted[mine])
    return Candidates(experts, usd, quality, own, mapped, np.zeros(len(rows), dtype=np.int64))


def _row(routed: Routed) -> dict[str, float]:
    """Expert -> estimated quality of each candidate; NaN where nothing was estimated."""
    if not routed.decision.experts:  # the router refuses
        return {}
    inputs = routed.inputs
    if inputs is None or inputs.fallback is not None or len(inputs.estimate.experts) == 1:
        return {routed.decision.experts[0]: np.nan}
    estimate = inputs.estimate
    permitted = np.array([[name in inputs.allowed for name in estimate.experts]]) & ~np.isnan(estimate.quality)
    candidates = Ranking.of(permitted, estimate.eligible, None).candidates[0]
    return {
        name: float(estimated)
        for name, estimated, may in zip(estimate.experts, estimate.quality[0], candidates, strict=True)
        if may
    }


def write_candidates(folder: Folder, part: int, candidates: Candidates, rows: Sequence[RoutedRow], note: bytes) -> None:
    """Write the candidates of the rows of a part; `note` is what is known of the part."""
    ids, lines = [row.id for row in rows], [row.line for row in rows]
    columns: dict[str, Any] = {_ID: pa.array(ids, pa.string()), _LINE: pa.array(lines, pa.int64())}
    columns |= {"own": candidates.own, "mapped": candidates.mapped}
    for column, name in enumerate(candidates.experts):
        columns[_PRICE + name] = candidates.price_usd[:, column]
        columns[_QUALITY + name] = candidates.quality[:, column]
    table = pa.table(columns)
    with folder.write(_candidates(part)) as file:
        pq.write_table(table.replace_schema_metadata({_NOTE: note}), file)


def note_of(folder: Folder, part: int) -> bytes | None:
    """What was noted with the candidates of a part; None if they were not written."""
    if not folder.exists(_candidates(part)):
        return None
    with folder.open(_candidates(part)) as file:
        return bytes(pq.read_schema(file).metadata[_NOTE])


def read_candidates(folder: Folder, parts: Iterable[int]) -> tuple[Candidates, list[int]]:
    """The candidates of all parts, in the order of the input, and the number of rows of each."""
    tables = [_table(folder, part) for part in parts]
    names = {name.removeprefix(_PRICE) for table in tables for name in table.column_names if name.startswith(_PRICE)}
    experts, counts = tuple(sorted(names)), [table.num_rows for table in tables]
    shape, row = (sum(counts), len(experts)), 0
    usd, quality = np.full(shape, np.nan), np.full(shape, np.nan)
    own, mapped = np.full(shape[0], -1, dtype=np.int64), np.zeros(shape[0], dtype=bool)
    for table, count in zip(tables, counts, strict=True):
        mine = slice(row, row + count)
        present = [name for name in experts if _PRICE + name in table.column_names]
        columns = np.array([experts.index(name) for name in present], dtype=np.int64)
        for name, column in zip(present, columns, strict=True):
            usd[mine, column] = table.column(_PRICE + name).to_numpy()
            quality[mine, column] = table.column(_QUALITY + name).to_numpy()
        local = table.column("own").to_numpy()
        if present:
            own[mine] = np.where(local >= 0, columns[local], -1)
        mapped[mine] = table.column("mapped").to_numpy()
        row += count
    first_line = _first_lines(tables)
    return Candidates(experts, usd, quality, np.where(first_line > 0, -1, own), mapped, first_line), counts


def _first_lines(tables: Sequence[pa.Table]) -> NDArray[np.int64]:
    """See `Candidates.first_line`. The merge of the results keeps the first row with an id, too."""
    ids = pa.chunked_array([chunk for table in tables for chunk in table.column(_ID).chunks], pa.string())
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    lines = np.concatenate([table.column(_LINE).to_numpy() for table in tables])
    _, first, mine = np.unique(codes, return_index=True, return_inverse=True)
    return np.where(first[mine] == np.arange(codes.size), 0, lines[first[mine]]).astype(np.int64)


def _table(folder: Folder, part: int) -> Any:
    with folder.open(_candidates(part)) as file:
        return pq.read_table(file)


def _candidates(part: int) -> str:
    return f"parts/candidates/{part // 1000:03d}/{part:06d}.parquet"
