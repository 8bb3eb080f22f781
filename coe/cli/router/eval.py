"""`coe router eval`: measure saved routers on a table that they were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from coe.cli.flags import Seed
from coe.cli.option_groups import with_option_groups
from coe.cli.output import console
from coe.cli.router.options import AnswerOptions, TableOptions, encoder_of, names_of, table_of
from coe.cli.router.report import ReportOptions, parse_required, progress_bars, warnings_on_console
from coe.cli.router.signals import SignalOptions

if TYPE_CHECKING:
    from routers.evaluation.curves import Sweep
    from routers.outcomes.table import OutcomeTable


@with_option_groups
def evaluate(
    router: Annotated[list[Path], typer.Argument(metavar="ROUTER_DIR...", help="Folders of saved routers.")],
    tables: TableOptions,
    answers: AnswerOptions,
    output: ReportOptions,
    signals: SignalOptions,
    train_outcomes: Annotated[
        Path | None,
        typer.Option(
            "--train-outcomes", metavar="FILE", help="The training table; adds kNN and category routers trained on it."
        ),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            "--variants",
            metavar="FILE",
            help="Rewordings and translations of requests (columns group, prompt, variant): how many get the same "
            "expert.",
        ),
    ] = None,
    save_curve: Annotated[
        bool,
        typer.Option(
            "--save-curve",
            help="Keep the cost-quality curve in the folder of each router, for the page /ui of a service.",
        ),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Measure saved routers on a table that they were not trained on. `coe eval` measures experts."""
    from routers.artifacts import load
    from routers.evaluation.consistency import Variants, consistency
    from routers.evaluation.cross_validation import evaluate, standard_baselines

    required, choosing, table = parse_required(output.require or []), answers.choosing(), tables.read()
    train_table = None if train_outcomes is None else table_of(train_outcomes, None, tables.prices)
    reworded = None if variants is None else Variants.read(variants)
    reports = []
    with warnings_on_console(), progress_bars() as bar:
        on_progress = bar("encoding prompts")
        for folder in router:
            loaded = load(folder, make_encoder=lambda name: encoder_of(name, on_progress))
            encoder = getattr(loaded.router, "encoder", None)
            chosen = choosing.at(loaded.meta.cost_weight) if answers.cost_weight is None else choosing
            report = evaluate(
                loaded.router,
                signals.add_to(table, loaded.router.requires, bar("reading signals")),
                name=str(folder),
                reference=loaded.meta.reference,
                train_table=train_table,
                baselines={} if train_table is None else standard_baselines(encoder, seed=seed),
                experts=names_of(tables.experts),
                choosing=chosen,
                seed=seed,
            )
            if reworded is not None:
                rows = signals.add_to(reworded.table(report.detail.table.experts), loaded.router.requires, on_progress)
                report = report.with_consistency(consistency(loaded.router, reworded, rows, chosen))
            reports.append(report)
            if save_curve:
                keep_curve(report.detail.curve, report.detail.table, folder, loaded.meta.digest, tables.outcomes, seed)
    if train_table is None:
        console.print("note: --train-outcomes adds kNN and category routers to the table", style="dim")
    output.write(reports, required, title=tables.outcomes.name)


def keep_curve(curve: Sweep | None, table: OutcomeTable, folder: Path, digest: str, outcomes: Path, seed: int) -> None:
    """Save the curve of a router beside it, or say why there is none."""
    from routers.evaluation.saved_curve import CURVE, save_curve, saved_curve

    if curve is None:
        console.print(
            f"[yellow]warning:[/] {escape(str(folder))}: no curve is saved: it needs costs of the table "
            "(`cost::<expert>` columns, or --prices) and of the router, and one expert per query (no --compose)",
            highlight=False,
        )
        return
    found = saved_curve(curve, table, router=digest, measured="held out", name=outcomes.name, seed=seed)
    save_curve(found, folder)
    console.print(f"saved {folder / CURVE}", highlight=False, markup=False)
