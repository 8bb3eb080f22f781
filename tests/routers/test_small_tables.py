"""Every kind works at its default settings on tables of 20 rows and more; settings that are too large are errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers import artifacts
from routers.encoders.build import HashingEncoder
from routers.errors import RouterError
from routers.evaluation.cross_validation import cross_validate
from routers.evaluation.recorded_routing import route
from routers.factory import KINDS, build, reads_text
from routers.kinds.auto.candidates import BASELINE_KIND
from routers.numeric.folds import stratified_folds

ENCODER = HashingEncoder(32)
LEARNING = sorted(set(KINDS) - {"fixed"})
TEST = planted_table(60, seed=1)


def made(kind, **settings):
    return build(kind, ENCODER if reads_text(kind) else None, settings)


@pytest.mark.parametrize("domains", [True, False])
@pytest.mark.parametrize("kind", LEARNING)
def test_a_kind_learns_from_twenty_rows_and_is_saved(kind, domains, tmp_path):
    table = planted_table(20, domains=domains)
    if kind == "skill" and not domains:
        with pytest.raises(RouterError, match="domain"):
            made(kind).fit(table)
        return
    router = made(kind).fit(table)
    encoder = ENCODER if reads_text(kind) else None
    artifacts.save(router, tmp_path / "router", table=table, encoder=encoder)
    loaded = artifacts.load(tmp_path / "router", make_encoder=lambda name: ENCODER).router
    ours, theirs = route(router, TEST), route(loaded, TEST)
    assert np.isfinite(ours.quality).all()
    np.testing.assert_array_equal(ours.quality, theirs.quality)


@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("rows", [20, 66])
def test_a_kind_is_cross_validated_on_few_rows(kind, rows):
    table = planted_table(rows)
    found = cross_validate(lambda: made(kind), table, stratified_folds(table.domains, 5))
    assert found.n_queries == rows
    assert 0 <= found.accuracy <= 1


@pytest.mark.parametrize("kind", ["knn", "cluster", "quality", "auto", "category"])
def test_the_planted_structure_is_found_in_sixty_six_rows(kind):
    picks = route(made(kind).fit(planted_table(66)), TEST).picks
    base = route(made(BASELINE_KIND).fit(planted_table(66)), TEST).picks
    won, kept = (TEST.scores[np.arange(len(TEST)), chosen].mean() for chosen in (picks, base))
    assert won > kept


@pytest.mark.parametrize("method", ["conformal", "risk", "calibrated"])
def test_a_guard_calibrates_on_up_to_half_of_a_small_table(method):
    router = made("guarded", method=method).fit(planted_table(40))
    if method == "conformal":
        assert len(router.model.calibration) == 10
    assert len(route(router, TEST).picks) == len(TEST)


def test_a_risk_that_too_few_rows_cannot_guarantee_is_refused():
    with pytest.raises(RouterError, match="cannot be guaranteed by 10 calibration queries: at least 19"):
        made("guarded", method="risk").fit(planted_table(20))


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("knn", {"k": 67}, "k=67 neighbours asked of 66"),
        ("cluster", {"n_clusters": 67}, "67 clusters asked of 66"),
        ("category", {"classifier": "knn", "k": 67}, "k=67 neighbours asked of 66"),
        ("guarded", {"calibration_share": 0.1}, "leaves 7 to calibrate on: at least 10"),
    ],
)
def test_a_setting_that_is_too_large_is_an_error(kind, settings, problem):
    with pytest.raises(RouterError, match=problem):
        made(kind, **settings).fit(planted_table(66))


@pytest.mark.parametrize(("rows", "k"), [(20, 10), (66, 33), (200, 100), (5000, 100)])
def test_the_default_number_of_neighbours_grows_to_a_hundred(rows, k):
    assert made("knn").settings.neighbours(rows) == k


@pytest.mark.parametrize(("rows", "n_clusters"), [(20, 4), (100, 20), (320, 64), (5000, 64)])
def test_the_default_number_of_clusters_grows_to_sixty_four(rows, n_clusters):
    assert made("cluster").settings.clusters(rows) == n_clusters


def test_more_rows_make_the_default_number_of_neighbours_larger():
    table = planted_table(120)
    first = made("knn").fit(table.select(np.arange(60)))
    both = first.extended(table.select(np.arange(60, 120)))
    whole = made("knn").fit(table)
    np.testing.assert_array_equal(route(both, TEST).quality, route(whole, TEST).quality)


@pytest.mark.parametrize("domains", [[str(i) for i in range(20)], ["a", *(str(i) for i in range(18)), "a"]])
@pytest.mark.parametrize("kind", sorted(set(LEARNING) - {"skill"}))
def test_domains_of_one_row_each_are_no_error(kind, domains):
    table = replace(planted_table(20), domains=tuple(domains))
    chosen = route(made(kind).fit(table), TEST)
    assert np.isfinite(chosen.quality).all()
