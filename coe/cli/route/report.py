"""Output of a decision: as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from coe.cli.output import stdout_console
from coe.cli.route.recruiting import print_recruiting
from coe.cli.router.report import per_thousand

if TYPE_CHECKING:
    from rich.table import Table

    from routers.base import Estimate, RoutingDecision
    from routers.kinds.skill.recruiting import Explanation


def route_document(
    estimate: Estimate, decision: RoutingDecision, recruiting: Explanation | None = None
) -> dict[str, Any]:
    """The JSON document of the decision, plus `estimate`, `ood` and, of a skill router, `recruiting`.

    `estimate` has `quality` and `cost_usd` of every expert that the router knows.
    """
    from coe.protocol.decision import decision_document, json_number

    costs = (None,) * len(estimate.experts) if estimate.cost_usd is None else estimate.cost_usd[0].tolist()
    quality = estimate.quality[0].tolist()
    return {
        **decision_document(decision),
        "estimate": {
            expert: {"quality": json_number(value), "cost_usd": json_number(cost)}
            for expert, value, cost in zip(estimate.experts, quality, costs, strict=True)
        },
        "ood": None if estimate.ood is None else json_number(float(estimate.ood[0])),
        "recruiting": recruiting,
    }


def print_explanation(
    estimate: Estimate,
    decision: RoutingDecision,
    *,
    ranked: bool,
    recruiting: Explanation | None = None,
    removed: Mapping[str, str] | None = None,
    named: bool = False,
    composition: str | None = None,
    composed: Sequence[str] = (),
) -> None:
    """Print the category, the confidence, and the expected score and cost of every expert, best first.

    Args:
        ranked: the decision ranks all candidates and only the first one is asked; else a selector chose its experts.
        recruiting: printed before the table of scores.
        removed: expert -> the constraint that excludes it; printed below the table.
        named: a policy names its expert: no score was estimated, so none is printed.
        composition: of the policy. composed: lines about composed experts.
    """
    out = stdout_console()
    facts = {"reason": decision.reason or None} if named else _facts(estimate, decision)
    facts |= {"composition": None if composition == "single" else composition}
    for name, value in facts.items():
        if value is not None:
            out.print(f"{name:>19}: {value}", markup=False, highlight=False)
    for line in composed:
        out.print(f"{'composed expert':>19}: {line}", markup=False, highlight=False, soft_wrap=True)
    if recruiting is not None:
        print_recruiting(out, recruiting, decision)
    if not named:
        out.print(_scores(estimate, decision, ranked=ranked))
    for name, why in (removed or {}).items():
        if name in estimate.experts:
            out.print(f"{name}: {why}", markup=False, highlight=False)


def _scores(estimate: Estimate, decision: RoutingDecision, *, ranked: bool) -> Table:
    """The expected score, cost and utility of every expert, best first."""
    from rich.table import Table

    utilities = dict(zip(decision.experts, decision.scores, strict=True))
    table = Table("expert", "expected score", "USD / 1k", "utility")
    rows = sorted(
        range(len(estimate.experts)),
        key=lambda m: (-utilities.get(estimate.experts[m], -9e99), -estimate.quality[0, m]),
    )
    asked, left_out = (decision.experts[:1], "not eligible") if ranked else (decision.experts, "not chosen")
    for m in rows:
        name = estimate.experts[m]
        cost = None if estimate.cost_usd is None else float(estimate.cost_usd[0, m])
        utility = f"{utilities[name]:.4f}" if name in utilities else left_out
        style = "bold" if name in asked else ""
        table.add_row(escape(name), f"{estimate.quality[0, m]:.4f}", per_thousand(cost), utility, style=style)
    return table


def _facts(estimate: Estimate, decision: RoutingDecision) -> dict[str, Any]:
    return {
        "category": decision.label,
        "confidence": f"{decision.confidence:.3f}",
        "out of distribution": None if estimate.ood is None else f"{float(estimate.ood[0]):.3f}",
        "abstained": "yes, so the generalist answers" if decision.abstained else None,
        "truncated": "yes: the prompt is longer than the encoder reads" if decision.truncated else None,
        "reason": decision.reason or None,
    }
