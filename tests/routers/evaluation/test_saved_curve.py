"""The curve that is kept beside a router: what it holds, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.encoders.build import build_encoder
from routers.errors import InvalidArtifact
from routers.evaluation.cost_weight import out_of_fold
from routers.evaluation.saved_curve import (
    CURVE,
    MOST_BYTES,
    MOST_POINTS,
    SavedCurve,
    read_curve,
    save_curve,
    saved_curve,
)
from routers.factory import build


@pytest.fixture(scope="module")
def curve() -> SavedCurve:
    table, encoder = planted_table(120), build_encoder("hashing:64")
    sweep = out_of_fold(lambda: build("knn", encoder, {}), table, np.arange(120) % 3).sweep(table)
    assert sweep is not None
    found = saved_curve(sweep, table, router="sha256:1", measured="out of fold", name="outcomes.parquet")
    ends = (found.points[0], found.points[-1])
    assert [point.accuracy for point in ends] == [sweep.accuracy[0], sweep.accuracy[-1]]
    assert [point.mean_cost for point in ends] == [sweep.mean_cost[0], sweep.mean_cost[-1]]
    return found


def test_points_are_thinned_and_bounded_by_their_intervals(curve: SavedCurve) -> None:
    weights = [point.cost_weight for point in curve.points]
    assert len(weights) <= MOST_POINTS and weights == sorted(set(weights)) and weights[0] == 0
    assert all(point.low <= point.accuracy + 1e-6 and point.accuracy <= point.high + 1e-6 for point in curve.points)
    scores = [each.accuracy for each in curve.experts]
    assert scores == sorted(scores, reverse=True) and len(scores) == 5
    assert {each.name for each in curve.experts} >= {"generalist", "law-expert"}


def test_a_curve_is_read_as_it_was_saved_and_only_for_its_router(curve: SavedCurve, tmp_path: Path) -> None:
    assert read_curve(tmp_path, "sha256:1") is None
    save_curve(curve, tmp_path)
    assert read_curve(tmp_path, "sha256:1") == curve
    with pytest.raises(InvalidArtifact, match="another router.*--save-curve"):
        read_curve(tmp_path, "sha256:2")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"points": []}, "points"),
        ({"points": [{"cost_weight": 0, "mean_cost": -1, "accuracy": 0.5, "low": 0, "high": 1}]}, "mean_cost"),
        ({"points": [{"cost_weight": 0, "mean_cost": 1, "accuracy": 2, "low": 0, "high": 1}]}, "accuracy"),
        ({"format": 2}, "format"),
        ({"experts": [{"name": "x" * 600, "mean_cost": 1, "accuracy": 1}]}, "name"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_curve_is_refused_with_its_place(
    curve: SavedCurve, tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    (tmp_path / CURVE).write_text(json.dumps(curve.model_dump() | changes))
    with pytest.raises(InvalidArtifact, match=f"{CURVE} is not a curve: .*{why}"):
        read_curve(tmp_path, "sha256:1")


def test_files_that_are_no_curve_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b"[]", b'{"points": [NaN]}', b"[" * 10_000):
        (tmp_path / CURVE).write_bytes(content)
        with pytest.raises(InvalidArtifact, match="is not a curve"):
            read_curve(tmp_path, "sha256:1")
    (tmp_path / CURVE).write_bytes(b" " * (MOST_BYTES + 1))
    with pytest.raises(InvalidArtifact, match="more than 262,144 bytes"):
        read_curve(tmp_path, "sha256:1")
    (tmp_path / CURVE).unlink()
    (tmp_path / CURVE).mkdir()
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        read_curve(tmp_path, "sha256:1")
