"""`coe router compare`: compare routers with a reference, query by query."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.flags import Seed
from coe.cli.option_groups import with_option_groups
from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.router.options import CostWeight, TableOptions, encoder_of
from coe.cli.router.report import (
    Require,
    check_required,
    encoding_progress,
    parse_required,
    per_thousand,
    warnings_on_console,
)
from coe.cli.router.signals import SignalOptions

if TYPE_CHECKING:
    from routers.evaluation.compare import Comparison
    from routers.evaluation.summary import ReportRow
    from routers.outcomes.table import OutcomeTable


@with_option_groups
def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT.json|ROUTER_DIR...",
            help="Reports written with --with-picks, or folders of saved routers. The first router is the reference.",
        ),
    ],
    tables: TableOptions,
    signals: SignalOptions,
    cost_weight: CostWeight = None,
    seed: Seed = 0,
    require: Require = None,
    json: JsonTarget = None,
) -> None:
    """Compare routers on the same queries: paired differences with intervals, wins and losses, costs."""
    from routers.evaluation.compare import Comparison, compare

    required, table = parse_required(require or [], of=Comparison), tables.read()
    with warnings_on_console():
        rows = [named for source in sources for named in _rows(source, table, cost_weight, signals)]
    if len(rows) < 2:
        raise typer.BadParameter("there is only one router: give two, or a report of several", param_hint="sources")
    (reference, theirs), *others = rows
    found = [compare(name, ours, reference, theirs, seed=seed) for name, ours in others]
    if json != "-":
        _print(reference, theirs, found, title=tables.outcomes.name)
    emit_json([comparison.to_json() for comparison in found], json)
    check_required(found, required)


def _rows(
    source: Path, table: OutcomeTable, cost_weight: float | None, signals: SignalOptions
) -> Iterator[tuple[str, ReportRow]]:
    """(name, row) of every router in a report or a folder."""
    from routers.evaluation.compare import row_of_picks

    if source.is_dir():
        yield str(source), _routed(source, table, cost_weight, signals)
        return
    for document in _read(source):
        name = f"{source.stem}: {document['router']}"
        if "picks" not in document:
            raise typer.BadParameter(f"{source} has no picks: write it with --with-picks", param_hint="sources")
        yield name, row_of_picks(table, document["picks"], source=name)


def _read(source: Path) -> Sequence[dict[str, Any]]:
    try:
        documents = json_text.loads(source.read_text(encoding="utf-8"))
        if all(isinstance(document["router"], str) for document in documents):
            return list(documents)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{source} is no report of `coe router`: {error}", param_hint="sources") from error
    raise typer.BadParameter(f"{source} is no report of `coe router`", param_hint="sources")


def _routed(folder: Path, table: OutcomeTable, cost_weight: float | None, signals: SignalOptions) -> ReportRow:
    from routers.artifacts import load
    from routers.decision import Utility
    from routers.evaluation.cross_validation import warn_of_overlap
    from routers.evaluation.recorded_routing import Choosing, route
    from routers.evaluation.report import row_of

    with encoding_progress() as on_progress:
        loaded = load(folder, make_encoder=lambda name: encoder_of(name, on_progress))
        warn_of_overlap(loaded.meta.reference, table)
        table = table.with_experts([name for name in table.experts if name in loaded.router.experts])
        choosing = Choosing(Utility(cost_weight=loaded.meta.cost_weight if cost_weight is None else cost_weight))
        table = signals.add_to(table, loaded.router.requires, on_progress)
        return row_of(table, route(loaded.router, table, choosing))


def _print(reference: str, theirs: ReportRow, found: Sequence[Comparison], *, title: str) -> None:
    from rich import box
    from rich.table import Table

    heading = f"{title}: {len(theirs.scores):,} queries, compared with {reference}"
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold", min_width=14)
    for name in ("accuracy", "difference", "won : lost", "USD / 1k"):
        table.add_column(name, justify="right", no_wrap=True)
    row = (f"{100 * theirs.accuracy:.2f}%", "", "", per_thousand(theirs.mean_cost))
    table.add_row(escape(reference), *row)
    for one in found:
        low, high = 100 * one.gain_ci95_low, 100 * one.gain_ci95_high
        table.add_row(
            escape(one.router),
            f"{100 * one.accuracy:.2f}%",
            f"{100 * one.gain:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{one.wins:,} : {one.losses:,}",
            per_thousand(one.mean_cost) + ("" if one.cost_gain is None else f" ({1e3 * one.cost_gain:+.4f})"),
        )
    stdout_console().print(table)
