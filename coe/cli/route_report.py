"""How a decision is shown: as a table for people, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from coe.cli.output import stdout_console
from coe.cli.router_report import per_thousand

if TYPE_CHECKING:
    from routers.base import Estimate, RoutingDecision


def decision_document(estimate: Estimate, decision: RoutingDecision) -> dict[str, Any]:
    """JSON form of one decision, with the estimate that it was made from."""
    costs = estimate.cost_usd
    return {
        "expert": decision.experts[0] if decision.experts else None,
        "experts": list(decision.experts),
        "scores": list(decision.scores),
        "confidence": decision.confidence,
        "label": decision.label,
        "abstained": decision.abstained,
        "reason": decision.reason,
        "truncated": decision.truncated,
        "ood": None if estimate.ood is None else float(estimate.ood[0]),
        "quality": dict(zip(estimate.experts, estimate.quality[0].tolist(), strict=True)),
        "cost_usd": None if costs is None else dict(zip(estimate.experts, costs[0].tolist(), strict=True)),
    }


def print_explanation(estimate: Estimate, decision: RoutingDecision) -> None:
    """Why: the category, the confidence, and every expert's expected score and cost, best first."""
    from rich.table import Table

    out = stdout_console()
    facts: dict[str, Any] = {"category": decision.label, "confidence": f"{decision.confidence:.3f}"}
    if estimate.ood is not None:
        facts["unlike training"] = f"{float(estimate.ood[0]):.3f}"
    facts["abstained"] = "yes, so the generalist answers" if decision.abstained else None
    facts["truncated"] = "yes: the prompt is longer than the encoder reads" if decision.truncated else None
    facts["reason"] = decision.reason or None
    for name, value in facts.items():
        if value is not None:
            out.print(f"{name:>16}: {value}", markup=False, highlight=False)
    utilities = dict(zip(decision.experts, decision.scores, strict=True))
    table = Table("expert", "expected score", "USD / 1k", "utility")
    rows = sorted(
        range(len(estimate.experts)),
        key=lambda m: (-utilities.get(estimate.experts[m], -9e99), -estimate.quality[0, m]),
    )
    for m in rows:
        name = estimate.experts[m]
        cost = None if estimate.cost_usd is None else float(estimate.cost_usd[0, m])
        utility = f"{utilities[name]:.4f}" if name in utilities else "not eligible"
        chosen = name in decision.experts[:1]
        table.add_row(
            escape(name), f"{estimate.quality[0, m]:.4f}", per_thousand(cost), utility, style="bold" if chosen else ""
        )
    out.print(table)
