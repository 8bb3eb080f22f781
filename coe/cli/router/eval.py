"""`coe router eval`: what saved routers are worth on a table that they were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.registry import RegistryUrl
from coe.cli.router.options import (
    Compose,
    CostWeight,
    Experts,
    Outcomes,
    Plot,
    Prices,
    Require,
    Seed,
    Select,
    TopK,
    WithPicks,
    compose_of,
    encoder_of,
    names_of,
    selector_of,
    table_of,
)
from coe.cli.router.report import (
    check_required,
    draw,
    encoding_progress,
    parse_required,
    print_reports,
    report_documents,
    warnings_on_console,
)
from coe.cli.router.signals import SignalConfig, with_signals

if TYPE_CHECKING:
    from routers.artifacts import LoadedRouter
    from routers.evaluation.cross_validation import Factory
    from routers.outcomes.table import OutcomeTable


def evaluate(
    router: Annotated[list[Path], typer.Argument(metavar="ROUTER_DIR...", help="Folders of saved routers.")],
    outcomes: Outcomes,
    experts: Experts = None,
    prices: Prices = None,
    train_outcomes: Annotated[
        Path | None,
        typer.Option("--train-outcomes", help="The training table: also shows kNN and category trained on it."),
    ] = None,
    cost_weight: CostWeight = None,
    top_k: TopK = 1,
    select: Select = None,
    compose: Compose = None,
    seed: Seed = 0,
    plot: Plot = None,
    with_picks: WithPicks = False,
    require: Require = None,
    config: SignalConfig = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Score saved routers on a table that they were not trained on."""
    from routers.artifacts import load
    from routers.decision import Utility
    from routers.evaluation.cross_validation import evaluate

    required, recorded = parse_required(require or []), compose_of(compose, top_k)
    table = table_of(outcomes, experts, prices)
    train_table = None if train_outcomes is None else table_of(train_outcomes, None, prices)
    reports = []
    with warnings_on_console(), encoding_progress() as on_progress:
        for folder in router:
            loaded = load(folder, make_encoder=lambda name: encoder_of(name, on_progress))
            report = evaluate(
                loaded.router,
                with_signals(table, loaded.router.requires, on_progress, config=config, url=registry),
                name=str(folder),
                reference=loaded.meta.reference,
                train_table=train_table,
                baselines=_baselines(loaded, train_table, seed),
                experts=names_of(experts),
                utility=Utility(cost_weight=loaded.meta.cost_weight if cost_weight is None else cost_weight),
                select=selector_of(select, top_k),
                compose=recorded,
                composition=compose or "single",
                seed=seed,
            )
            reports.append(report)
    if train_table is None:
        console.print("note: kNN and category have to be trained to stand in the table: --train-outcomes", style="dim")
    if json != "-":
        print_reports(reports, title=outcomes.name)
    emit_json(report_documents(reports, with_picks=with_picks), json)
    if plot is not None:
        draw(reports, plot, title=outcomes.name)
    check_required(reports, required)


def _baselines(loaded: LoadedRouter, train_table: OutcomeTable | None, seed: int) -> dict[str, Factory]:
    """Of the encoder that the router reads with."""
    from routers.evaluation.cross_validation import standard_baselines

    return {} if train_table is None else standard_baselines(getattr(loaded.router, "encoder", None), seed=seed)
