"""RouterReport: the figures of one router on one table, compared with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.evaluation import curves, metrics
from routers.evaluation.consistency import Consistency
from routers.evaluation.cost_weight import Solution, Target
from routers.evaluation.pair import PairCurve, pair_curve
from routers.evaluation.recorded_routing import Routing
from routers.evaluation.summary import ReportRow
from routers.outcomes.table import OutcomeTable

_NOT_IN_JSON = {"in_json": False}


@dataclass(frozen=True, slots=True)
class Detail:
    """The data of a report, query by query, for plots and paired comparisons.

    Attributes:
        table: the n scored rows; routing: the router's choices, in the same order.
        curve: the router at every cost weight; `None` without costs, and for compositions.
        pair: PGR curve of a pool of two experts, else `None`.
    """

    table: OutcomeTable
    routing: Routing
    curve: curves.Sweep | None
    pair: PairCurve | None


@dataclass(frozen=True, slots=True)
class RouterReport:
    """One router on one table; accuracies are mean scores in [0, 1], costs USD per query, unknown figures `None`.

    Attributes:
        best_single: accuracy of the expert that was best on the training rows; dataset_oracle: of the expert that was
            best on the training rows of each query's true domain; oracle: of the best expert of each query.
        gain_over_best_single: accuracy - best_single, with its 95% paired bootstrap interval.
        gap_recovered: (accuracy - best_single) / (oracle - best_single).
        route_ms_p50: median milliseconds to encode and decide one query alone, nothing cached.
        baselines: name -> accuracy; baseline_costs: name -> mean cost.
        cost_saved: 1 - mean_cost / best_single_cost at the cost weight in use, with its 95% paired bootstrap interval;
            perf_gain: accuracy / best_single - 1 there.
        aiq: mean height of the cost-quality hull between c_min and c_max, the mean costs of the cheapest and
            of the most expensive single expert on these rows; aiq_experts: the same of the single experts' own hull.
        ece: calibration error of the expected score of the first choice, against its actual score.
        apgr, cpt50, cpt80: of a pool of two, strong and weak on these rows (see `routers.evaluation.pair`).
        cost_weights: the cost weight in use: one, or one per fold if solved; target: what they were solved for.
        calls: experts asked per query; top_k, composition: the most experts asked, and how answers are combined.
        abstained, truncated, refused: shares of the queries; a refused query asks no expert, scores 0 and costs 0.
        expert_use: expert -> share of the queries that it answers first.
        by_domain: domain -> n_queries, accuracy, best_single, expert_use; `None` if the table has no domains.
        consistency: share of rewordings and translations that get the same expert; consistency_whole: share of requests
            of which all do; consistency_by_variant: label -> share. `None` without variants.
    """

    router: str
    kind: str
    n_queries: int
    n_experts: int
    accuracy: float
    best_single: float | None
    dataset_oracle: float | None
    oracle: float
    gain_over_best_single: float | None
    gain_ci95_low: float | None
    gain_ci95_high: float | None
    gap_recovered: float | None
    mean_cost: float | None
    best_single_cost: float | None
    route_ms_p50: float | None
    baselines: Mapping[str, float]
    baseline_costs: Mapping[str, float | None]
    cost_saved: float | None
    cost_saved_ci95_low: float | None
    cost_saved_ci95_high: float | None
    perf_gain: float | None
    aiq: float | None
    aiq_experts: float | None
    c_min: float | None
    c_max: float | None
    ece: float | None
    apgr: float | None
    cpt50: float | None
    cpt80: float | None
    cost_weights: Sequence[float]
    target: Mapping[str, Any] | None
    top_k: int
    composition: str
    calls: float
    abstained: float
    truncated: float
    refused: float
    expert_use: Mapping[str, float]
    by_domain: Mapping[str, Mapping[str, Any]] | None
    detail: Detail = field(metadata=_NOT_IN_JSON, repr=False, compare=False)
    consistency: float | None = None
    consistency_whole: float | None = None
    consistency_by_variant: Mapping[str, float] | None = None

    def with_consistency(self, found: Consistency) -> RouterReport:
        """The report with the figures of the variants."""
        return replace(
            self,
            consistency=found.same,
            consistency_whole=found.whole,
            consistency_by_variant=found.by_label,
        )

    def picks(self) -> dict[str, str | None]:
        """query id -> the expert asked first; `None` for a refused query."""
        table, routing = self.detail.table, self.detail.routing
        names = [None if no else table.experts[m] for m, no in zip(routing.picks, routing.refused, strict=True)]
        return dict(zip(table.query_ids, names, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The object that `coe router cv` and `coe router eval` write."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("in_json", True)}


@dataclass(frozen=True, slots=True)
class Heading:
    """The settings that a report was made with.

    Attributes:
        name, kind: of the router; cost_weights: in use; target, solutions: how they were solved, one per fold.
        top_k, composition: the most experts asked, and how answers are combined.
        route_ms: median milliseconds per decision.
        seed: of the bootstrap.
    """

    name: str
    kind: str
    cost_weights: Sequence[float] = (0.0,)
    target: Target | None = None
    solutions: Sequence[Solution] = ()
    top_k: int = 1
    composition: str = "single"
    route_ms: float | None = None
    seed: int = 0


def report(heading: Heading, table: OutcomeTable, routing: Routing, baselines: Mapping[str, ReportRow]) -> RouterReport:
    """Compare a routing of the table's n queries with the baselines."""
    routed, best, dataset = row_of(table, routing), baselines.get("best_single"), baselines.get("dataset_oracle")
    oracle = baselines["oracle"].accuracy
    curve = routing.sweep(table) if routing.scores is None else None
    pair = _pair(table, routing)
    calls = routing.calls
    return RouterReport(
        router=heading.name,
        kind=heading.kind,
        n_queries=len(table),
        n_experts=len(table.experts),
        accuracy=routed.accuracy,
        best_single=best.accuracy if best else None,
        dataset_oracle=dataset.accuracy if dataset else None,
        oracle=oracle,
        gap_recovered=metrics.gap_recovered(routed.accuracy, best.accuracy, oracle) if best else None,
        mean_cost=routed.mean_cost,
        best_single_cost=best.mean_cost if best else None,
        route_ms_p50=heading.route_ms,
        baselines={label: row.accuracy for label, row in baselines.items()},
        baseline_costs={label: row.mean_cost for label, row in baselines.items()},
        **_gains(routed, best, heading.seed),
        **_areas(table, curve),
        ece=_ece(table, routing),
        apgr=pair.apgr if pair else None,
        cpt50=pair.cpt(0.5) if pair else None,
        cpt80=pair.cpt(0.8) if pair else None,
        cost_weights=tuple(heading.cost_weights),
        target=_target(heading),
        top_k=heading.top_k,
        composition=heading.composition,
        calls=float((~routing.refused).mean() if calls is None else calls.mean()),
        abstained=float(routing.abstained.mean()),
        truncated=float(routing.truncated.mean()),
        refused=float(routing.refused.mean()),
        expert_use=_use(table, routing, np.ones(len(table), dtype=bool)),
        by_domain=_by_domain(table, routing, routed, best),
        detail=Detail(table, routing, curve, pair),
    )


def row_of(table: OutcomeTable, routing: Routing) -> ReportRow:
    """Scores and costs of the choices; a refused query scores and costs 0."""
    if routing.scores is not None:
        return ReportRow(routing.scores, routing.spent)
    return ReportRow.of(table, routing.picks).answered(~routing.refused)


def _ece(table: OutcomeTable, routing: Routing) -> float | None:
    """ECE of the expected scores of the first choices, over the queries that are not refused."""
    asked = ~routing.refused
    scores = metrics.picked(table.scores, routing.picks)
    return metrics.expected_calibration_error(routing.expected[asked], scores[asked]) if asked.any() else None


def _use(table: OutcomeTable, routing: Routing, rows: NDArray[np.bool_]) -> dict[str, float]:
    asked = rows & ~routing.refused
    return metrics.expert_use(routing.picks[asked], table.experts) if asked.any() else {}


def _gains(routed: ReportRow, best: ReportRow | None, seed: int) -> dict[str, Any]:
    """Gain over the best single expert and cost saved, with their intervals."""
    names = ["gain_over_best_single", "gain_ci95_low", "gain_ci95_high", "perf_gain"]
    names += ["cost_saved", "cost_saved_ci95_low", "cost_saved_ci95_high"]
    found: dict[str, Any] = dict.fromkeys(names)
    if best is None:
        return found
    low, high = metrics.paired_bootstrap(routed.scores, best.scores, seed=seed)
    gain, perf = routed.accuracy - best.accuracy, metrics.perf_gain(routed.accuracy, best.accuracy)
    found |= {"gain_over_best_single": gain, "gain_ci95_low": low, "gain_ci95_high": high, "perf_gain": perf}
    if routed.costs is not None and best.costs is not None:
        saved = metrics.cost_save(float(routed.costs.mean()), float(best.costs.mean()))
        low_high = metrics.bootstrap_saving(routed.costs, best.costs, seed=seed) or (None, None)
        found |= {"cost_saved": saved, "cost_saved_ci95_low": low_high[0], "cost_saved_ci95_high": low_high[1]}
    return found


def _areas(table: OutcomeTable, curve: curves.Sweep | None) -> dict[str, Any]:
    """AIQ of the router and of the single experts, between the costs of the cheapest and the most expensive."""
    if table.costs_usd is None:
        return dict.fromkeys(("aiq", "aiq_experts", "c_min", "c_max"))
    costs, scores = table.costs_usd.mean(axis=0), table.scores.mean(axis=0)
    low, high = float(costs.min()), float(costs.max())
    return {
        "aiq": None if curve is None else curves.aiq(curve.mean_cost, curve.accuracy, low, high),
        "aiq_experts": curves.aiq(costs, scores, low, high),
        "c_min": low,
        "c_max": high,
    }


def _pair(table: OutcomeTable, routing: Routing) -> PairCurve | None:
    """The PGR curve of a pool of two; the strong expert is the better one on these rows."""
    if len(table.experts) != 2:
        return None
    strong = int(table.scores.mean(axis=0).argmax())
    preference = routing.quality[:, strong] - routing.quality[:, 1 - strong]
    return pair_curve(preference, table.scores[:, strong], table.scores[:, 1 - strong])


def _target(heading: Heading) -> dict[str, Any] | None:
    if heading.target is None:
        return None
    return {"name": heading.target.name, "folds": [solution.to_json(heading.target) for solution in heading.solutions]}


def _by_domain(
    table: OutcomeTable, routing: Routing, routed: ReportRow, best: ReportRow | None
) -> dict[str, dict[str, Any]] | None:
    if table.domains is None:
        return None
    domains, found = np.array(table.domains, dtype=object), {}
    for domain in sorted(set(table.domains)):
        rows = domains == domain
        found[domain] = {
            "n_queries": int(rows.sum()),
            "accuracy": float(routed.scores[rows].mean()),
            "best_single": None if best is None else float(best.scores[rows].mean()),
            "mean_cost": None if routed.costs is None else float(routed.costs[rows].mean()),
            "expert_use": _use(table, routing, rows),
        }
    return found
