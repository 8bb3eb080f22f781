"""What `coe router train` solves out of fold: the cost weight, and the selector or composition of a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from coe.cli.output import console
from coe.cli.router.options import kind_of

if TYPE_CHECKING:
    from routers.base import Estimate
    from routers.decision import Utility
    from routers.evaluation.cost_weight import Target
    from routers.evaluation.recorded_routing import Routing
    from routers.outcomes.table import OutcomeTable


def solve_cost_weight(routing: Routing, table: OutcomeTable, target: Target) -> dict[str, Any]:
    """The cost weight for a target, in the form that an artifact stores."""
    from routers.evaluation.cost_weight import MeetBudget, solve_on

    found = solve_on(routing, table, target)
    saved = 1 - found.mean_cost / found.best_single_cost if found.best_single_cost else 0.0
    console.print(
        f"cost weight {found.cost_weight:.4g}: out of fold {100 * found.accuracy:.2f}% at {1e3 * found.mean_cost:.4f} "
        f"USD per 1k queries, {100 * saved:.1f}% less than the best single expert ({100 * found.best_single:.2f}%)",
        highlight=False,
    )
    if not found.met:
        missed = "this budget" if isinstance(target, MeetBudget) else "the accuracy of the best single expert"
        console.print(f"[yellow]warning:[/] no cost weight reaches {missed} on the training folds; using the closest")
    return found.to_json(target)


def solve_policy(
    routing: Routing, table: OutcomeTable, calls: float, *, k: int, compose: str | None, cost_weight: float
) -> dict[str, Any]:
    """`select` and `composition` of a policy that asks at most `calls` of k experts per query on average.

    Args:
        compose: `None` solves the probability of a `dynamic` selector; `cascade`, with settings, its confidence.

    Raises:
        typer.BadParameter: another composition, which has no confidence to solve.
        InvalidOutcomes: a cascade without recorded answers.
    """
    from routers.base import Estimate
    from routers.decision import Utility

    estimate = Estimate(table.experts, routing.quality, routing.costs, eligible=routing.eligible)
    utility = Utility(cost_weight)
    solved = _dynamic(estimate, utility, calls, k) if compose is None else None
    policy = solved or _cascade(estimate, utility, table, calls, k, compose or "")
    shown = ", ".join(f"{name}: {_inline(value)}" for name, value in policy.items())
    console.print(
        f"at most {calls:g} experts per query out of fold: set {shown} in the policy", highlight=False, markup=False
    )
    return policy


def _dynamic(estimate: Estimate, utility: Utility, calls: float, k: int) -> dict[str, Any]:
    from routers.evaluation.thresholds import dynamic_for_calls
    from routers.selectors import selector_document

    return {"select": selector_document(dynamic_for_calls(estimate, calls, k=k, utility=utility))}


def _cascade(
    estimate: Estimate, utility: Utility, table: OutcomeTable, calls: float, k: int, compose: str
) -> dict[str, Any]:
    from coe.compose import build_composition
    from coe.evaluation.recorded_answers import confidence_for_calls
    from routers.decision import decide
    from routers.selectors import TopK, selector_document

    kind, settings = kind_of(compose, "--compose")
    if kind != "cascade":
        raise typer.BadParameter("only `cascade` has a confidence to solve", param_hint="--compose")
    confidence = confidence_for_calls(
        table,
        decide(estimate, utility=utility, k=k),
        lambda at: build_composition(kind, {**settings, "confidence": at}),
        calls,
    )
    return {
        "select": selector_document(TopK(k)),
        "composition": {"kind": kind, **settings, "confidence": confidence},
    }


def _inline(document: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in document.items()) + "}"
