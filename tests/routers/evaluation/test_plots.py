from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.encoders.build import HashingEncoder
from routers.evaluation.cross_validation import cross_validate_all, stratified_folds
from routers.evaluation.plots import draw_reports, figure
from routers.factory import build

ENCODER = HashingEncoder(64)


def reports(table):
    makes = {"near": partial(build, "knn", ENCODER, {"k": 15}), "always": partial(build, "best-single")}
    return cross_validate_all(makes, table, stratified_folds(table.query_ids, 3))


def texts(axes):
    return [text.get_text() for text in (*axes.texts, *axes.get_legend().get_texts())]


def test_a_png_is_written_whole(tmp_path):
    draw_reports(reports(planted_table(150)), tmp_path / "out.png", title="mine")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_the_curve_is_the_sweep_in_usd_per_thousand():
    found = reports(planted_table(150))
    curve, reliability, domains, _ = figure(found).axes
    line = curve.lines[0]
    order = np.argsort(found[0].detail.curve.mean_cost, kind="stable")
    np.testing.assert_allclose(line.get_xdata(), 1e3 * found[0].detail.curve.mean_cost[order])
    np.testing.assert_allclose(line.get_ydata(), 100 * found[0].detail.curve.accuracy[order])
    assert curve.get_xlabel() == "mean cost (USD per 1,000 queries)"
    assert f"near (AIQ {100 * found[0].aiq:.1f}%)" in texts(curve)
    assert f"near (ECE {100 * found[0].ece:.1f})" in texts(reliability)
    assert [label.get_text() for label in domains.get_yticklabels()][:3] == ["near", "always", "best single"]


def test_routers_can_be_told_apart_in_grey():
    dashes = [(line.get_linestyle(), line.get_marker()) for line in figure(reports(planted_table(150))).axes[1].lines]
    assert len(set(dashes)) == len(dashes)


def test_costs_far_apart_stand_on_a_logarithmic_axis_with_plain_numbers():
    table = planted_table(90)
    wide = replace(table, costs_usd=table.costs_usd * [1, 5, 20, 50, 100])
    drawn = figure(reports(wide))
    drawn.canvas.draw()
    axes = drawn.axes[0]
    assert axes.get_xscale() == "log"
    shown = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))]
    assert {"1", "2", "5", "10"} <= set(shown)
    assert not any("10^" in text for text in shown)


def test_domains_show_every_expert_by_falling_mean():
    table = planted_table(200)
    axes = figure(reports(table)).axes[2]
    names = [label.get_text() for label in axes.get_yticklabels()][3:]
    assert names == [table.experts[m] for m in np.argsort(-table.scores.mean(axis=0), kind="stable")]
    values = axes.images[0].get_array()
    rows = np.array(table.domains) == "law"
    column = [label.get_text().split(" ")[0] for label in axes.get_xticklabels()].index("law")
    generalist = names.index("generalist") + 3
    assert values[generalist, column] == pytest.approx(100 * table.scores[rows, -1].mean())


def test_without_costs_accuracies_are_drawn_and_without_domains_no_map():
    found = reports(planted_table(150, costs=False, domains=False))
    axes = figure(found).axes
    assert len(axes) == 2
    assert axes[0].get_xlabel() == "accuracy (%)"
    assert "near" in [label.get_text() for label in axes[0].get_yticklabels()]


def test_a_pool_of_two_without_costs_shows_what_strong_calls_recover():
    table = planted_table(150, costs=False).with_experts(["generalist", "law-expert"])
    found = reports(table)
    axes = figure(found).axes[0]
    assert axes.get_xlabel() == "calls of the strong expert (%)"
    assert f"near (APGR {found[0].apgr:.3f})" in texts(axes)


def test_calibration_keeps_equal_expectations_together():
    found = reports(planted_table(150))[1:]  # best-single expects one score in each of three folds
    bars = figure(found).axes[1].containers[0]
    x, y = np.array(bars[0].get_data(), dtype=float)
    routing, table = found[0].detail.routing, found[0].detail.table
    expected = np.unique(routing.expected)
    np.testing.assert_allclose(x, 100 * expected)
    scores = table.scores[np.arange(len(table)), routing.picks]
    np.testing.assert_allclose(y, [100 * scores[routing.expected == one].mean() for one in expected])
