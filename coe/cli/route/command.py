"""`coe route`: which expert, or experts, a saved router or a policy chooses for a query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.registry import RegistryUrl
from coe.cli.route.report import decision_document, print_explanation
from coe.cli.router.options import CostWeight, names_of, tell_of_truncation
from coe.cli.router.report import warnings_on_console
from coe.cli.router.signals import query_with_signals

if TYPE_CHECKING:
    from routers.base import Estimate, Query, Router, RoutingDecision
    from routers.kinds.skill.recruiting import Explanation
    from routers.selectors import Selector


def route(
    text: Annotated[str, typer.Argument(help="The query.")],
    router: Annotated[
        Path | None, typer.Option("--router", help="Folder of a saved router; with --config, its signals come from it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration (YAML): route by a policy of the service.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Policy of --config; by default its `default_policy`.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the estimate of every expert.")] = False,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            help="Selector: top-k, recruit, cascade or dynamic; by default the policy's, or for --router recruit where "
            "the router weighs experts.",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", min=1, help="Most experts to choose.")] = None,
    allowed: Annotated[str | None, typer.Option("--allowed", metavar="A,B", help="Only these may answer.")] = None,
    cost_weight: CostWeight = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Show which expert a router, or a policy of a service, chooses for a query. No expert answers it."""
    if router is None and config is None:
        raise typer.BadParameter("give --config FILE of a service, or --router DIR of a saved router")
    if policy is not None and (config is None or router is not None):
        raise typer.BadParameter("it names a policy of --config, without --router", param_hint="--policy")
    if router is None:
        assert config is not None
        decided = _by_policy(config, policy, text, select, top_k, allowed, cost_weight)
    else:
        decided = _by_router(router, text, select, top_k, allowed, cost_weight, config=config, registry=registry)
    _show(decided, explain=explain, to_stdout=json != "-")
    emit_json(decision_document(decided.estimate, decided.decision, decided.recruiting), json)


@dataclass(frozen=True, slots=True)
class _Decided:
    """A decision to show. ranked: it ranks all that may answer, and the first one is chosen."""

    estimate: Estimate
    decision: RoutingDecision
    ranked: bool
    recruiting: Explanation | None


def _by_policy(
    config: Path,
    policy: str | None,
    text: str,
    select: str | None,
    top_k: int | None,
    allowed: str | None,
    cost_weight: float | None,
) -> _Decided:
    from coe.cli.route.policy import decide_by_policy
    from routers.base import Query
    from routers.selectors import build_selector

    chosen = None
    if select is not None or top_k is not None:
        chosen = build_selector(select or "top-k", **({} if top_k is None else {"k": top_k}))
    names = names_of(allowed)
    query = replace(Query.of(text), allowed=None if names is None else frozenset(names), cost_weight=cost_weight)
    with warnings_on_console():
        routed, inputs, router, filled = decide_by_policy(config, policy, query, chosen)
    _show_truncation(router, text)
    return _Decided(inputs.estimate, routed.decision, False, _recruiting(router, filled))


def _by_router(
    folder: Path,
    text: str,
    select: str | None,
    top_k: int | None,
    allowed: str | None,
    cost_weight: float | None,
    *,
    config: Path | None,
    registry: str | None,
) -> _Decided:
    from routers.artifacts import load
    from routers.base import Query
    from routers.decision import Utility, decide

    with warnings_on_console():
        loaded = load(folder)
    query = query_with_signals(Query.of(text), loaded.router.requires, config=config, url=registry)
    estimate = loaded.router.estimate([query])
    chosen = _selector(select, top_k, estimate)
    utility = Utility(cost_weight=loaded.meta.cost_weight if cost_weight is None else cost_weight)
    ranking = len(estimate.experts) if chosen is None else None
    (decision,) = decide(estimate, utility=utility, allowed=names_of(allowed), select=chosen, k=ranking)
    _show_truncation(loaded.router, text)
    return _Decided(estimate, decision, chosen is None, _recruiting(loaded.router, query))


def _show(decided: _Decided, *, explain: bool, to_stdout: bool) -> None:
    if not to_stdout:
        return
    experts = decided.decision.experts[:1] if decided.ranked else decided.decision.experts
    stdout_console().print("\n".join(experts) or "no expert", highlight=False, markup=False)
    if explain:
        print_explanation(decided.estimate, decided.decision, ranked=decided.ranked, recruiting=decided.recruiting)


def _show_truncation(router: Router, text: str) -> None:
    encodes = getattr(router, "encoder", None)
    if encodes is not None:
        tell_of_truncation(encodes, [text])


def _selector(select: str | None, top_k: int | None, estimate: Estimate) -> Selector | None:
    """The selector that the flags name, or `recruit` where the router weighs its experts; None ranks all of them."""
    from routers.selectors import build_selector

    if select is None and top_k is None and estimate.weights is None:
        return None
    kind = select or ("top-k" if estimate.weights is None else "recruit")
    return build_selector(kind, **({} if top_k is None else {"k": top_k}))


def _recruiting(router: Router, query: Query) -> Explanation | None:
    """The explanation of a skill router; None of another one."""
    explains = getattr(router, "explain", None)
    return None if explains is None else explains(query)
