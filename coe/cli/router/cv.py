"""`coe router cv`: what routers are worth, by cross-validation on one table."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from coe.cli.output import JsonTarget, emit_json
from coe.cli.registry import RegistryUrl
from coe.cli.router.auto_report import telling
from coe.cli.router.options import (
    BudgetMinutes,
    BudgetUsd,
    Compose,
    CostWeight,
    EncoderName,
    Encoders,
    Experts,
    FoldColumn,
    Folds,
    LabelColumn,
    Margin,
    Outcomes,
    Plot,
    Prices,
    Require,
    SaveCostFlag,
    Seed,
    Select,
    Settings,
    TopK,
    WithPicks,
    compose_of,
    encoder_of,
    first_and_further,
    folds_of,
    selector_of,
    settings_of_kinds,
    table_of,
    target_of,
    tell_of_truncation,
)
from coe.cli.router.report import (
    check_required,
    draw,
    parse_required,
    print_reports,
    progress_bars,
    report_documents,
    warnings_on_console,
)
from coe.cli.router.signals import SignalConfig, with_signals


def cv(
    outcomes: Outcomes,
    kind: Annotated[list[str], typer.Option("--kind", help="Router to cross-validate; may be repeated.")],
    fold_column: FoldColumn = "fold",
    folds: Folds = 5,
    experts: Experts = None,
    prices: Prices = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    encoder: EncoderName = None,
    settings: Settings = None,
    cost_weight: CostWeight = None,
    budget_usd: BudgetUsd = None,
    save_cost: SaveCostFlag = False,
    margin: Margin = None,
    top_k: TopK = 1,
    select: Select = None,
    compose: Compose = None,
    budget_minutes: BudgetMinutes = None,
    encoders: Encoders = None,
    plot: Plot = None,
    with_picks: WithPicks = False,
    require: Require = None,
    config: SignalConfig = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Cross-validate routers: train on all folds but one, score the one left out, pool them."""
    from routers.decision import Utility
    from routers.evaluation.cross_validation import BASELINE_KINDS, cross_validate_all, standard_baselines
    from routers.factory import build, reads_text

    required, target = parse_required(require or []), target_of(budget_usd, save_cost, margin)
    if target is not None and cost_weight is not None:
        raise typer.BadParameter("the cost weight is either given or solved", param_hint="--cost-weight")
    encoder, further = first_and_further(encoder, encoders)
    flags = {"label_column": label_column, "budget_minutes": budget_minutes, "encoders": further}
    chosen = settings_of_kinds(kind, settings or [], seed, **flags)
    plain = settings_of_kinds(BASELINE_KINDS, [], seed)
    recorded = compose_of(compose, top_k)
    table = table_of(outcomes, experts, prices)
    assigned = folds_of(table, fold_column, folds, seed)
    with warnings_on_console(), progress_bars() as bar:
        on_progress = bar("encoding prompts")
        encodes = encoder_of(encoder, on_progress) if encoder or any(map(reads_text, kind)) else None
        if encodes is not None:
            encodes.encode(table.prompts)  # all folds at once: one bar, and the cache serves every fold
            tell_of_truncation(encodes, table.prompts)
        requires = {name for n in kind for name in build(n, encodes, chosen[n]).requires}
        table = with_signals(table, requires, bar("reading signals"), config=config, url=registry)
        baselines = standard_baselines(encodes, seed=seed)
        # A kind at its default settings is the baseline of that name: trained once, it stands in both places.
        as_baseline = {name for name in baselines if chosen.get(name) == plain[name]}
        reports = cross_validate_all(
            {n: baselines[n] if n in as_baseline else telling(partial(build, n, encodes, chosen[n])) for n in kind},
            table,
            assigned,
            baselines=baselines,
            utility=Utility(cost_weight=cost_weight or 0.0),
            target=target,
            select=selector_of(select, top_k),
            compose=recorded,
            composition=compose or "single",
            seed=seed,
            on_progress=bar("training routers"),
        )
    title = f"{outcomes.name}, {len(set(assigned.tolist()))} folds"
    if json != "-":
        print_reports(reports, title=title)
    emit_json(report_documents(reports, with_picks=with_picks), json)
    if plot is not None:
        draw(reports, plot, title=title)
    check_required(reports, required)
