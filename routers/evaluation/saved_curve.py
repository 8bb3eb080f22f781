"""The cost-quality curve of a saved router, kept in its folder as `curve.json`, for whoever serves it.

It is measured on rows that the router was not trained on: out of fold by `coe router train`, or on another table by
`coe router eval --save-curve`. It names the digest of the router, so that a curve of an earlier router is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.storage import atomic_path
from routers.errors import InvalidArtifact
from routers.evaluation import curves
from routers.outcomes.table import OutcomeTable

CURVE: Final = "curve.json"
MOST_POINTS: Final = 60
"""Points that are kept of a sweep of 200."""
MOST_EXPERTS: Final = 50
"""Single experts that are kept: those of the highest accuracy."""
MOST_BYTES: Final = 256 * 1024
"""Most bytes of a file that is read."""
AGAIN: Final = "measure it with `coe router eval DIR --outcomes FILE --save-curve`"
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(max_length=512)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CurvePoint(_Part):
    """The router at one cost weight: USD per query, accuracy, and its 95% bootstrap interval."""

    cost_weight: _Usd
    mean_cost: _Usd
    accuracy: _Share
    low: _Share
    high: _Share


class ExpertPoint(_Part):
    """An expert that answers every query of the table."""

    name: _Name
    mean_cost: _Usd
    accuracy: _Share


class SavedCurve(_Part):
    """A curve as it is stored.

    Attributes:
        router: digest of the router. measured: how; table: name of the file; rows: number of queries.
        points: by ascending cost weight.
    """

    format: Literal[1] = 1
    router: _Name
    measured: Literal["out of fold", "held out"]
    table: _Name
    rows: Annotated[int, Field(ge=1)]
    created: Annotated[str, Field(max_length=40)]
    points: Annotated[Sequence[CurvePoint], Field(min_length=1, max_length=1000)]
    experts: Annotated[Sequence[ExpertPoint], Field(max_length=1000)]


def saved_curve(
    sweep: curves.Sweep,
    table: OutcomeTable,
    *,
    router: str,
    measured: Literal["out of fold", "held out"],
    name: str,
    seed: int = 0,
) -> SavedCurve:
    """The curve of a sweep over the rows of a table with costs.

    Args:
        router: digest of the router. name: of the table's file.
        seed: of the bootstrap.
    """
    assert table.costs_usd is not None  # a sweep has costs
    low, high = curves.band(sweep, seed=seed)
    last = len(sweep.cost_weights) - 1
    kept = np.unique(np.linspace(0, last, min(MOST_POINTS, last + 1)).round().astype(int)).tolist()
    columns = np.clip(np.stack([sweep.accuracy, low, high], axis=1), 0.0, 1.0).tolist()
    points = [
        CurvePoint(
            cost_weight=float(sweep.cost_weights[i]),
            mean_cost=float(sweep.mean_cost[i]),
            accuracy=columns[i][0],
            low=columns[i][1],
            high=columns[i][2],
        )
        for i in kept
    ]
    costs, scores = table.costs_usd.mean(axis=0), table.scores.mean(axis=0)
    best = np.argsort(-scores, kind="stable")[:MOST_EXPERTS].tolist()
    return SavedCurve(
        router=router,
        measured=measured,
        table=name[:512],
        rows=len(table),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        points=points,
        experts=[
            ExpertPoint(name=table.experts[m], mean_cost=float(costs[m]), accuracy=float(scores[m])) for m in best
        ],
    )


def save_curve(curve: SavedCurve, folder: Path) -> None:
    """Write the curve into the folder of its router, in place of an earlier one."""
    with atomic_path(folder / CURVE) as staged:
        staged.write_text(curve.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_curve(folder: Path, router: str) -> SavedCurve | None:
    """The curve in a router's folder; None if there is none. The folder may come from an untrusted source.

    Args:
        router: digest of the router.

    Raises:
        InvalidArtifact: the file cannot be read, is no curve, or is that of another router.
    """
    path = folder / CURVE
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidArtifact(f"{path} cannot be read: {error}") from error
    if len(text) > MOST_BYTES:
        raise InvalidArtifact(f"{path} has more than {MOST_BYTES:,} bytes, so it is not a curve: {AGAIN}")
    try:
        curve = SavedCurve.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        raise InvalidArtifact(f"{path} is not a curve: {where}: {first['msg'][:200]}; {AGAIN}") from error
    if curve.router != router:
        raise InvalidArtifact(f"{path} was measured with another router than the one in its folder: {AGAIN}")
    return curve
