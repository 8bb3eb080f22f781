"""`coe route`: which expert, or experts, a saved router gives a query to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.registry import RegistryUrl
from coe.cli.route.report import decision_document, print_explanation
from coe.cli.router.options import CostWeight, names_of, tell_of_truncation
from coe.cli.router.report import warnings_on_console
from coe.cli.router.signals import SignalConfig, query_with_signals

if TYPE_CHECKING:
    from routers.base import Estimate, Query, Router
    from routers.kinds.skill.recruiting import Explanation
    from routers.selectors import Selector


def route(
    text: Annotated[str, typer.Argument(help="The query.")],
    router: Annotated[Path, typer.Option("--router", help="Folder of a saved router.")],
    explain: Annotated[bool, typer.Option("--explain", help="Show what the router thinks of every expert.")] = False,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            help="Who is asked: top-k, recruit, cascade or dynamic; by default recruit if the router weighs experts.",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", min=1, help="Most experts to ask.")] = None,
    allowed: Annotated[str | None, typer.Option("--allowed", metavar="A,B", help="Only these may answer.")] = None,
    cost_weight: CostWeight = None,
    config: SignalConfig = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Say whom a saved router gives a query to; nobody is asked to answer it."""
    from routers.artifacts import load
    from routers.base import Query
    from routers.decision import Utility, decide

    with warnings_on_console():
        loaded = load(router)
    query = query_with_signals(Query.of(text), loaded.router.requires, config=config, url=registry)
    estimate = loaded.router.estimate([query])
    chosen = _selector(select, top_k, estimate)
    utility = Utility(cost_weight=loaded.meta.cost_weight if cost_weight is None else cost_weight)
    ranking = len(estimate.experts) if chosen is None else None
    (decision,) = decide(estimate, utility=utility, allowed=names_of(allowed), select=chosen, k=ranking)
    encodes = getattr(loaded.router, "encoder", None)
    if encodes is not None:
        tell_of_truncation(encodes, [text])
    recruiting = _recruiting(loaded.router, query)
    asked = decision.experts[:1] if chosen is None else decision.experts
    if json != "-":
        stdout_console().print("\n".join(asked) or "nobody", highlight=False, markup=False)
        if explain:
            print_explanation(estimate, decision, ranked=chosen is None, recruiting=recruiting)
    emit_json(decision_document(estimate, decision, recruiting), json)


def _selector(select: str | None, top_k: int | None, estimate: Estimate) -> Selector | None:
    """Who is asked, where that is said, or where the router weighs its experts; else all are ranked."""
    from routers.selectors import build_selector

    if select is None and top_k is None and estimate.weights is None:
        return None
    kind = select or ("top-k" if estimate.weights is None else "recruit")
    return build_selector(kind, **({} if top_k is None else {"k": top_k}))


def _recruiting(router: Router, query: Query) -> Explanation | None:
    """Why whom, where the router goes by skills."""
    explains = getattr(router, "explain", None)
    return None if explains is None else explains(query)
