"""Plots of reports: cost against quality, calibration, accuracy by domain. No display is needed.

Curves differ by dash and marker as well as by colour, so that a greyscale print is readable.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from routers.evaluation import curves, metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from routers.evaluation.report import RouterReport

STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#111111", ":", "D"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#E69F00", (0, (1, 1)), "P"),
)
"""Colour (Okabe and Ito's palette, safe for colour blindness), dash and marker of each router in turn."""
BANDS = 3
"""The most routers with a confidence band: more would hide each other."""
BINS = 10
LOG_FROM = 20.0
"""Costs that differ by more than this factor are drawn on a logarithmic axis."""
LABELLED = 6
"""The most single experts labelled in the plot of costs."""
CROWDED = 24
"""More domains than these are drawn without numbers, with vertical labels."""
_MILLE = 1e3


def draw_reports(reports: Sequence[RouterReport], path: Path | str, *, title: str = "") -> None:
    """Write a PNG: curves (accuracies if costs are unknown) and calibration on top, domains below.

    Args:
        reports: at least one, on the same queries and experts; single experts and baselines are drawn from the first.
        path: written atomically.
    """
    from registry.storage import atomic_path

    with atomic_path(Path(path)) as staged:
        figure(reports, title=title).savefig(staged, format="png", dpi=150)


def figure(reports: Sequence[RouterReport], *, title: str = "") -> Figure:
    """The plot as a matplotlib figure."""
    from matplotlib.figure import Figure

    domains = reports[0].by_domain
    rows = 0 if domains is None else len(reports[0].detail.table.experts) + len(reports) + 1
    heights = [5.0] if domains is None else [5.0, 1.9 + 0.24 * rows]
    found = Figure(figsize=(13, sum(heights)), layout="constrained")
    found.suptitle(title, fontsize=13)
    grid = found.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[1.6, 1])
    left = found.add_subplot(grid[0, 0])
    if any(report.detail.curve is not None for report in reports):
        draw_curves(left, reports)
    elif any(report.detail.pair is not None for report in reports):
        draw_pair(left, reports)
    else:
        draw_accuracies(left, reports)
    draw_reliability(found.add_subplot(grid[0, 1]), reports)
    if domains is not None:
        draw_domains(found.add_subplot(grid[1, :]), reports)
    return found


def draw_curves(axes: Axes, reports: Sequence[RouterReport]) -> None:
    """Accuracy (%) against USD per 1,000 queries: routers at every cost weight, single experts and their hull."""
    for index, report in enumerate(reports):
        if report.detail.curve is not None:
            _draw_curve(axes, report, index, with_band=index < BANDS)
    _draw_experts(axes, reports[0])
    axes.set(xlabel="mean cost (USD per 1,000 queries)", ylabel="accuracy (%)")
    _finish(axes, "quality at every cost weight; large marker: the cost weight in use; band: 95% bootstrap")


def _draw_curve(axes: Axes, report: RouterReport, index: int, *, with_band: bool) -> None:
    curve = report.detail.curve
    assert curve is not None
    colour, dash, marker = STYLES[index % len(STYLES)]
    order = np.argsort(curve.mean_cost, kind="stable")
    x, y = _MILLE * curve.mean_cost[order], 100 * curve.accuracy[order]
    axes.plot(x, y, color=colour, linestyle=dash, lw=1.8, label=f"{report.router}{_areas(report)}", zorder=4)
    if with_band:
        low, high = curves.band(curve)
        axes.fill_between(x, 100 * low[order], 100 * high[order], color=colour, alpha=0.13, lw=0)
    if report.mean_cost is not None:
        at = (_MILLE * report.mean_cost, 100 * report.accuracy)
        axes.plot(*at, marker, color=colour, ms=9, markeredgecolor="white", zorder=6)


def _areas(report: RouterReport) -> str:
    return "" if report.aiq is None else f" (AIQ {100 * report.aiq:.1f}%)"


def _draw_experts(axes: Axes, report: RouterReport) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter

    table = report.detail.table
    if table.costs_usd is None:
        return
    costs, scores = _MILLE * table.costs_usd.mean(axis=0), 100 * table.scores.mean(axis=0)
    axes.plot(costs, scores, "x", color="0.35", ms=5, label="single experts", zorder=3)
    at, height = curves.hull(costs, scores)
    between = np.linspace(at[0], costs.max(), 400)
    axes.plot(between, np.interp(between, at, height), color="0.45", lw=1, ls=(0, (2, 2)), label="their hull", zorder=2)
    _leave_out_below(axes, scores, float(height[0]))
    corners = [int(np.flatnonzero((costs == c) & (scores == s))[0]) for c, s in zip(at, height, strict=True)]
    if costs.min() > 0 and costs.max() > LOG_FROM * costs.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for column in corners[-LABELLED:]:
        right = costs[column] > 0.6 * costs.max()
        axes.annotate(
            _short(table.experts[column], 26),
            (costs[column], scores[column]),
            textcoords="offset points",
            xytext=(-5 if right else 6, -11),
            ha="right" if right else "left",
            fontsize=7,
            color="0.2",
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _leave_out_below(axes: Axes, scores: metrics.Floats, lowest: float) -> None:
    """Limit the height to the curves; experts far below the cheapest one on the hull are counted instead of drawn."""
    top = max(float(line.max()) for line in (np.asarray(drawn.get_ydata()) for drawn in axes.lines) if len(line))
    bottom = lowest - 0.35 * (top - lowest) - 1.0
    missing = int((scores < bottom).sum())
    axes.set_ylim(max(bottom, min(float(scores.min()) - 2.0, lowest - 2.0)), top + 0.12 * (top - lowest) + 1.0)
    if missing:
        text = f"{missing} expert{'s' * (missing > 1)} below"
        axes.text(0.01, 0.02, text, transform=axes.transAxes, fontsize=7, color="0.35")


def draw_pair(axes: Axes, reports: Sequence[RouterReport]) -> None:
    """Share of the gap between a weak and a strong expert (PGR, %) against the share of strong calls (%)."""
    axes.plot([0, 100], [0, 100], color="0.6", lw=1, ls=(0, (2, 2)), label="random")
    for index, report in enumerate(reports):
        pair = report.detail.pair
        if pair is not None:
            colour, dash, _ = STYLES[index % len(STYLES)]
            label = f"{report.router} (APGR {pair.apgr:.3f})"
            axes.plot(100 * pair.shares, 100 * pair.pgr, color=colour, linestyle=dash, lw=1.8, label=label)
    axes.set(xlabel="calls of the strong expert (%)", ylabel="gap between weak and strong recovered (%)")
    _finish(axes, "a strong and a weak expert")


def draw_accuracies(axes: Axes, reports: Sequence[RouterReport]) -> None:
    """Accuracies of routers, with the 95% intervals of their gains, and of baselines; drawn if costs are unknown."""
    baselines = {name.replace("_", " "): value for name, value in reports[0].baselines.items()}
    names = sorted(baselines, key=lambda name: baselines[name])
    for y, name in enumerate(names):
        at = (100 * baselines[name], y)
        axes.plot(*at, "x", color="0.35")
        axes.annotate(f"{at[0]:.1f}", at, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    for index, report in enumerate(reports):
        y = len(names)
        colour, _, marker = STYLES[index % len(STYLES)]
        value = 100 * report.accuracy
        if report.best_single is not None and report.gain_ci95_low is not None and report.gain_ci95_high is not None:
            ends = [100 * (report.best_single + end) for end in (report.gain_ci95_low, report.gain_ci95_high)]
            axes.plot(ends, [y, y], color=colour, lw=2)
        axes.plot(value, y, marker, color=colour, ms=8)
        axes.annotate(f"{value:.1f}", (value, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
        names.append(report.router)
    axes.set_yticks(range(len(names)), [_short(name, 28) for name in names])
    axes.set(ylim=(-0.5, len(names) - 0.2), xlabel="accuracy (%)")
    axes.set_title("accuracy; bar: 95% interval of the gain over the best single expert", fontsize=10)
    axes.grid(alpha=0.25, axis="x")


def draw_reliability(axes: Axes, reports: Sequence[RouterReport]) -> None:
    """Actual against expected score (%) of the chosen expert, in bins of equal mass; bar: one standard error."""
    axes.plot([0, 100], [0, 100], color="0.6", lw=1, ls=(0, (2, 2)))
    lowest = list[float]()
    for index, report in enumerate(reports):
        routing, table = report.detail.routing, report.detail.table
        asked = ~routing.refused
        expected, actual = routing.expected[asked], metrics.picked(table.scores, routing.picks)[asked]
        if not len(expected):
            continue
        colour, dash, marker = STYLES[index % len(STYLES)]
        bins = metrics.mass_bins(expected, BINS)
        parts = [np.flatnonzero(bins == one) for one in np.unique(bins)]
        x = [100 * expected[part].mean() for part in parts]
        y = [100 * actual[part].mean() for part in parts]
        error = [100 * actual[part].std() / np.sqrt(len(part)) for part in parts]
        lowest += [min(x), min(y)]
        name = f"{report.router} (ECE {100 * (report.ece or 0.0):.1f})"
        axes.errorbar(x, y, error, color=colour, linestyle=dash, marker=marker, ms=5, lw=1.2, label=name)
    low = 10 * np.floor(min(lowest, default=0.0) / 10)
    axes.set(xlim=(low, 100), ylim=(low, 100), aspect="equal")
    axes.set(xlabel="expected score of the chosen expert (%)", ylabel="actual score (%)")
    _finish(axes, "calibration, ten bins of equal mass", legend="upper left")


def draw_domains(axes: Axes, reports: Sequence[RouterReport]) -> None:
    """Accuracy (%) of routers, the best single expert and every expert in each domain; experts by falling mean."""
    first, table = reports[0], reports[0].detail.table
    assert first.by_domain is not None
    domains, of = list(first.by_domain), np.array(table.domains, dtype=object)
    by_expert = np.stack([table.scores[of == domain].mean(axis=0) for domain in domains], axis=1)  # (m, d)
    order = np.argsort(-table.scores.mean(axis=0), kind="stable")
    rows = [[(report.by_domain or {})[domain]["accuracy"] for domain in domains] for report in reports]
    names = [report.router for report in reports]
    if first.best_single is not None:
        rows.append([first.by_domain[domain]["best_single"] for domain in domains])
        names.append("best single")
    head = len(rows)
    values = 100 * np.concatenate([np.array(rows), by_expert[order]])
    names += [_short(table.experts[m], 34) for m in order]
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=float(values.min()), vmax=float(values.max()))
    middle = (values.min() + values.max()) / 2
    if len(domains) <= CROWDED:
        for row, column in np.ndindex(values.shape):
            ink = "black" if values[row, column] > middle else "white"
            text = f"{values[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    counts = [first.by_domain[domain]["n_queries"] for domain in domains]
    labels = [f"{_short(domain, 22)} ({count:,})" for domain, count in zip(domains, counts, strict=True)]
    crowded = len(domains) > CROWDED
    axes.set_xticks(range(len(domains)), labels, rotation=90 if crowded else 35, ha="center" if crowded else "right")
    axes.tick_params(axis="x", labelsize=6 if crowded else 8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axhline(head - 0.5, color="white", lw=3)
    axes.set_title("accuracy (%) in each domain (queries); above the line: routed and best single", fontsize=10)
    axes.figure.colorbar(image, ax=axes, label="accuracy (%)", pad=0.01)


def _finish(axes: Axes, title: str, legend: Literal["lower right", "upper left"] = "lower right") -> None:
    axes.set_title(title, fontsize=10)
    axes.legend(loc=legend, fontsize=8, framealpha=0.6)
    axes.grid(alpha=0.25)


def _short(name: str, length: int) -> str:
    """A name cut at its start: the ends of long names differ more."""
    return name if len(name) <= length else f"…{name[-length + 1 :]}"
