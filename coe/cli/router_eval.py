"""`coe router cv | eval`: what routers are worth, by cross-validation or on another table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.router_options import (
    Dial,
    EncoderName,
    Experts,
    LabelColumn,
    Outcomes,
    Prices,
    Require,
    Seed,
    Settings,
    encoder_of,
    names_of,
    settings_of_kinds,
    table_of,
    tell_of_truncation,
)
from coe.cli.router_report import check_required, encoding_progress, parse_required, print_reports, warnings_on_console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.dial import Factory
    from routers.outcomes import OutcomeTable


def cv(
    outcomes: Outcomes,
    kind: Annotated[list[str], typer.Option("--kind", help="Router to cross-validate; may be repeated.")],
    fold_column: Annotated[
        str, typer.Option("--fold-column", help="Column of folds; where it is missing, --folds are drawn.")
    ] = "fold",
    folds: Annotated[int, typer.Option("--folds", min=2, help="How many folds to draw, stratified by domain.")] = 5,
    experts: Experts = None,
    prices: Prices = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    encoder: EncoderName = "minilm",
    settings: Settings = None,
    dial: Dial = 0.0,
    require: Require = None,
    json: JsonTarget = None,
) -> None:
    """Cross-validate routers: train on all folds but one, score the one left out, pool them."""
    from routers.build import build, reads_text
    from routers.decide import Utility
    from routers.evaluate import cross_validate

    required = parse_required(require or [])
    chosen = settings_of_kinds(kind, settings or [], label_column, seed)
    table = table_of(outcomes, experts, prices)
    assigned = _folds(table, fold_column, folds, seed)
    with warnings_on_console(), encoding_progress() as on_progress:
        encodes = encoder_of(encoder, on_progress) if any(map(reads_text, kind)) else None
        if encodes is not None:
            encodes.encode(table.prompts)  # all folds at once: one bar, and the cache serves every fold
            tell_of_truncation(encodes, table.prompts)
        knn: dict[str, Factory] = {} if encodes is None else {"knn": partial(build, "knn", encodes)}
        reports = [
            cross_validate(
                partial(build, name, encodes, chosen[name]),
                table,
                assigned,
                baselines={} if name == "knn" else knn,
                utility=Utility(dial=dial),
                seed=seed,
            )
            for name in kind
        ]
    if json != "-":
        print_reports(reports, title=f"{outcomes.name}, {len(set(assigned.tolist()))} folds")
    emit_json([report.to_json() for report in reports], json)
    check_required(reports, required)


def evaluate(
    router: Annotated[list[Path], typer.Argument(metavar="ROUTER_DIR...", help="Folders of saved routers.")],
    outcomes: Outcomes,
    experts: Experts = None,
    prices: Prices = None,
    train_outcomes: Annotated[
        Path | None, typer.Option("--train-outcomes", help="The training table: also shows a kNN trained on it.")
    ] = None,
    dial: Dial = 0.0,
    seed: Seed = 0,
    require: Require = None,
    json: JsonTarget = None,
) -> None:
    """Score saved routers on a table that they were not trained on."""
    from routers.artifacts import load
    from routers.build import build
    from routers.decide import Utility
    from routers.evaluate import evaluate
    from routers.outcomes import OutcomeTable

    required = parse_required(require or [])
    table = table_of(outcomes, experts, prices)
    train_table = None if train_outcomes is None else OutcomeTable.read(train_outcomes)
    reports = []
    with warnings_on_console(), encoding_progress() as on_progress:
        for folder in router:
            loaded = load(folder, make_encoder=lambda name: encoder_of(name, on_progress))
            encodes = getattr(loaded.router, "encoder", None)
            knn: dict[str, Factory] = {}
            if train_table is not None and encodes is not None and loaded.meta.kind != "knn":
                knn["knn"] = partial(build, "knn", encodes)
            report = evaluate(
                loaded.router,
                table,
                name=str(folder),
                reference=loaded.meta.reference,
                train_table=train_table,
                baselines=knn,
                experts=names_of(experts),
                utility=Utility(dial=dial),
                seed=seed,
            )
            reports.append(report)
    if json != "-":
        print_reports(reports, title=outcomes.name)
    emit_json([report.to_json() for report in reports], json)
    check_required(reports, required)


def _folds(table: OutcomeTable, column: str, count: int, seed: int) -> NDArray[np.int64]:
    """The folds of a column, or drawn ones where the table has no column `fold`."""
    import numpy as np

    from routers.evaluate import stratified_folds

    if column == "fold" and table.folds is not None:
        return table.folds
    if column == "fold":
        console.print(f"the table has no folds: drawing {count}, stratified by domain, with seed {seed}")
        return stratified_folds(table.domains or ("",) * len(table), count, seed=seed)
    return np.unique(np.array(table.labels(column)), return_inverse=True)[1].astype(np.int64)
