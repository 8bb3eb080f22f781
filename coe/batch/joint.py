"""The rows of a batch assigned jointly (`routers.assignment`): the part files of it, and the decisions that follow.

    candidates/000/000012.parquet    price and estimated quality of each expert that may answer each row of a part
    assigned/000/000012.parquet      the expert of each row; none where its id is that of an earlier row
    assignment.json                  what the assignment is worth; written last, so a run that has it is assigned

The arrays of all rows are in memory at once while they are assigned, in the process of the command: about 100 bytes for
each row and expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coe.batch.budget import Budget
from coe.batch.candidates import Candidates, read_candidates
from coe.batch.errors import BudgetError
from coe.batch.records import RoutedRow, duplicate_id
from coe.runs.storage import Folder
from registry.store import Snapshot
from routers.assignment.joint import Assignment, BudgetPoint, assign, budget_points
from routers.assignment.problem import Infeasible, Problem
from routers.base import RoutingDecision

SUMMARY: Final = "parts/assignment.json"
GIB: Final = 2**30


def problem_of(
    candidates: Candidates, budget: Budget, snapshot: Snapshot, sizes: Mapping[str, int | None]
) -> tuple[Problem, NDArray[np.intp]]:
    """The problem of the rows that make a call, and their positions.

    Args:
        sizes: bytes of each residency; read only with a load weight.

    Raises:
        BudgetError: there is nothing to choose, since the router maps every row to one expert; or a size is unknown.
    """
    calls = np.flatnonzero(candidates.own >= 0)
    allowed = ~np.isnan(candidates.price_usd[calls])
    scored = ~np.isnan(candidates.quality[calls]).all(axis=1)
    if scored.any() and candidates.mapped[calls][scored].all():
        raise BudgetError(
            "the router leaves one expert for each row, so a budget has nothing to choose: use a policy whose router "
            "scores every expert (knn, quality, cluster, factor; category with `choice: soft`)"
        )
    residencies = [snapshot.residency(name) for name in candidates.experts]
    distinct = sorted(set(residencies))
    unknown = [name for name in distinct if sizes.get(name) is None]
    if budget.load_weight and unknown:
        raise BudgetError(
            f"the size of {unknown[0]!r} is unknown, so --load-weight cannot price its load: give `size_bytes`"
        )
    load_cost = [budget.load_weight * (sizes.get(name) or 0) / GIB for name in distinct]
    problem = Problem(
        np.nan_to_num(candidates.quality[calls]),
        candidates.price_usd[calls],
        allowed,
        budget.usd,
        np.array([budget.capacity.get(name, np.inf) for name in candidates.experts], dtype=np.float64),
        np.array([distinct.index(name) for name in residencies], dtype=np.intp),
        np.array(load_cost, dtype=np.float64),
        tuple(candidates.experts),
    )
    return problem, calls


def assign_parts(
    folder: Folder, parts: Sequence[int], budget: Budget, snapshot: Snapshot, sizes: Mapping[str, int | None]
) -> dict[str, Any]:
    """Assign all rows of the routed parts, write the expert of each, and return the summary; kept if it was written.

    Raises:
        BudgetError: no assignment meets the budget and the capacities, or none was found; where the budget is too
            small, the message has the least one, if it is known.
    """
    if folder.exists(SUMMARY):
        with folder.open(SUMMARY) as file:
            return dict(json.loads(file.read()))
    candidates, counts = read_candidates(folder, parts)
    problem, calls = problem_of(candidates, budget, snapshot, sizes)
    try:
        found = assign(problem)
    except Infeasible as error:
        raise _too_little(error, budget) from error
    chosen = np.full(len(candidates.own), -1, dtype=np.int64)
    chosen[calls] = found.chosen
    ends = np.cumsum(counts).tolist()
    for part, end, count in zip(parts, ends, counts, strict=True):
        _write_assigned(folder, part, candidates, chosen, slice(end - count, end), found)
    summary = _summary(candidates, problem, calls, found, budget)
    with folder.write(SUMMARY) as file:
        file.write(json.dumps(summary).encode())
    return summary


def points(
    folder: Folder,
    parts: Sequence[int],
    budget: Budget,
    snapshot: Snapshot,
    sizes: Mapping[str, int | None],
    count: int,
) -> list[BudgetPoint]:
    """What other budgets of the routed parts would buy, from the cheapest experts to the best ones."""
    problem, _ = problem_of(read_candidates(folder, parts)[0], budget, snapshot, sizes)
    return list(budget_points(problem, count))


def assigned_rows(folder: Folder, part: int, rows: Sequence[RoutedRow], budget: Budget) -> list[RoutedRow]:
    """The routed rows of a part with the decisions of the assignment."""
    with folder.open(_assigned(part)) as file:
        records = pq.read_table(file).to_pylist()
    return [_assigned_row(row, record, budget) for row, record in zip(rows, records, strict=True)]


def _assigned_row(row: RoutedRow, record: Mapping[str, Any], budget: Budget) -> RoutedRow:
    if record["first_line"]:
        return replace(row, decision=None, error=duplicate_id(row.id, row.line, record["first_line"]))
    return row if record["expert"] is None else replace(row, decision=_decision(row, record, budget))


def _decision(row: RoutedRow, record: Mapping[str, Any], budget: Budget) -> RoutingDecision:
    """The decision of a row: its own, where nothing was estimated; else for the assigned expert, with the reason."""
    expert, quality = record["expert"], record["quality"]
    assert row.decision is not None
    if quality is None:
        return row.decision
    return replace(
        row.decision,
        experts=(expert,),
        weights=(1.0,),
        scores=(record["score"],),
        quality=(quality,),
        confidence=min(max(quality, 0.0), 1.0),
        reason=f"assigned jointly within {budget.usd:g} USD: {expert} has an estimated quality of {quality:.3f} at "
        f"{record['price_usd']:.3g} USD; on its own the row goes to {row.decision.experts[0]}: {row.decision.reason}",
    )


def _write_assigned(
    folder: Folder,
    part: int,
    candidates: Candidates,
    chosen: NDArray[np.int64],
    mine: slice,
    found: Assignment,
) -> None:
    """The expert of each row of a part, its price, its quality, and its score at the dual prices."""
    columns = chosen[mine]
    called, rows = columns >= 0, np.arange(mine.start, mine.stop)
    quality = usd = score = np.full(rows.size, np.nan)
    if called.any():
        quality, usd = candidates.quality[rows, columns], candidates.price_usd[rows, columns]
        score = quality - found.prices.usd * usd - found.prices.capacity[columns]
    named = [candidates.experts[column] if call else None for column, call in zip(columns, called, strict=True)]
    estimated = called & ~np.isnan(quality)
    table = pa.table(
        {
            "expert": pa.array(named, pa.string()),
            "price_usd": pa.array(usd, mask=~called),
            "quality": pa.array(quality, mask=~estimated),
            "score": pa.array(score, mask=~estimated),
            "first_line": candidates.first_line[mine],
        }
    )
    with folder.write(_assigned(part)) as file:
        pq.write_table(table, file)


def _summary(
    candidates: Candidates,
    problem: Problem,
    calls: NDArray[np.intp],
    found: Assignment,
    budget: Budget,
) -> dict[str, Any]:
    """What the assignment is worth, as JSON values; qualities are sums over rows, so predicted right answers."""
    own = candidates.own[calls]
    names = candidates.experts
    several = problem.allowed.sum(axis=1) > 1
    counts = np.bincount(found.chosen, minlength=len(names))
    return {
        "budget_usd": budget.usd,
        "method": found.method,
        "rows": int(calls.size),
        "rows_with_choice": int(several.sum()),
        "price_usd": found.price_usd,
        "quality": found.quality,
        "load_cost": found.load_cost,
        "upper_bound": found.upper_bound,
        "gap": found.gap,
        "quality_per_usd": found.prices.usd,
        "quality_per_row_of_capacity": {
            name: float(price) for name, price in zip(names, found.prices.capacity, strict=True) if price
        },
        "experts": {name: int(count) for name, count in zip(names, counts, strict=True) if count},
        "loads": int(found.loaded.sum()),
        "own": {
            "price_usd": problem.price_of(own),
            "quality": problem.quality_of(own),
            "loads": int(problem.loads_of(own).sum()),
        },
        "priced_by_limit": [name for name in names if name not in budget.mean_tokens],
    }


def _too_little(error: Infeasible, budget: Budget) -> BudgetError:
    if error.needed_usd is None:
        return BudgetError(f"the rows cannot be assigned: {error}")
    return BudgetError(
        f"{error}. Start again with --budget-usd {_up(error.needed_usd)} or more"
        f"{', or with larger capacities' if budget.capacity else ''} (coe batch: and with another --out)"
    )


def _up(usd: float) -> str:
    """Three digits, rounded up."""
    step = 10.0 ** (np.floor(np.log10(usd)) - 2)
    return f"{np.ceil(round(usd / step, 6)) * step:.6g}"


def _assigned(part: int) -> str:
    return f"parts/assigned/{part // 1000:03d}/{part:06d}.parquet"
