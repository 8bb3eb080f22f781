"""Output of the router commands: tables, plots, JSON, progress bars, warnings, and required figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Task, progress

if TYPE_CHECKING:
    from rich.table import Table

    from routers.evaluation.compare import Comparison
    from routers.evaluation.report import RouterReport

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="FIGURE:LOW",
        help="Lowest value of a figure, e.g. gain_ci95_low:0; figures are the keys of --json; exit status 1 if one is "
        "below. Repeatable.",
    ),
]
MOST_NAMED = 6
"""Experts named in the line below the table."""


@dataclass(frozen=True)
class ReportOptions:
    """What is written about routers."""

    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw cost-quality curves, domains and calibration to this file, e.g. routers.png.",
        ),
    ] = None
    with_picks: Annotated[
        bool,
        typer.Option("--with-picks", help="Add the expert of every query to the JSON, for `coe router compare`."),
    ] = False
    require: Require = None
    json: JsonTarget = None

    def write(self, reports: Sequence[RouterReport], required: Mapping[str, float], *, title: str) -> None:
        """Print, write JSON, draw; then exit with 1 if a figure is below what is required."""
        if self.json != "-":
            print_reports(reports, title=title)
        picks = ({"picks": report.picks()} if self.with_picks else {} for report in reports)
        emit_json([report.to_json() | more for report, more in zip(reports, picks, strict=True)], self.json)
        if self.plot is not None:
            from routers.evaluation.plots import draw_reports

            draw_reports(reports, self.plot, title=title)
            console.print(f"drew {self.plot}", highlight=False, markup=False)
        check_required(reports, required)


def print_reports(reports: Sequence[RouterReport], *, title: str) -> None:
    """Print a table with one row per router and per baseline, the baselines from worst to best."""
    from rich import box
    from rich.table import Table

    queries = f"{title}: {reports[0].n_queries:,} queries, {reports[0].n_experts} experts"
    table = Table(title=queries, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", min_width=14)
    for heading in ("accuracy", "over best single", "gap", "USD / 1k", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, report in enumerate(reports):
        if index and not _agree(report.baselines, reports[index - 1].baselines):
            _add_baselines(table, reports[index - 1])
        _add_router(table, report)
    _add_baselines(
        table, max(reports, key=lambda report: len(report.baselines)) if _all_agree(reports) else reports[-1]
    )
    stdout_console().print(table)
    for report in reports:
        _print_use(report)


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two routers have the same baselines; one of them may have more."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def _all_agree(reports: Sequence[RouterReport]) -> bool:
    return all(_agree(report.baselines, reports[0].baselines) for report in reports)


def _add_router(table: Table, report: RouterReport) -> None:
    gain = "-"
    if report.gain_over_best_single is not None:
        low, high = report.gain_ci95_low or 0.0, report.gain_ci95_high or 0.0
        gain = f"{100 * report.gain_over_best_single:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    table.add_row(
        f"[bold]{escape(report.router)}[/]",
        f"[bold]{100 * report.accuracy:.2f}%[/]",
        gain,
        _percent(report.gap_recovered),
        per_thousand(report.mean_cost),
        _percent(report.cost_saved),
    )


def _add_baselines(table: Table, report: RouterReport) -> None:
    table.add_section()
    for name, accuracy in sorted(report.baselines.items(), key=lambda item: item[1]):
        gain = "-" if report.best_single is None else f"{100 * (accuracy - report.best_single):+.2f}"
        cost, single = report.baseline_costs[name], report.best_single_cost
        saved = "-" if cost is None or not single else _percent(1 - cost / single)
        row = (name.replace("_", " "), f"{100 * accuracy:.2f}%", gain, "", per_thousand(cost), saved)
        table.add_row(*row, style="dim")
    table.add_section()


def _print_use(report: RouterReport) -> None:
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(report.expert_use.items())[:MOST_NAMED])
    more = len(report.expert_use) - MOST_NAMED
    facts = [f"asked {shares}{f' and {more} more' if more > 0 else ''}", f"abstained on {_percent(report.abstained)}"]
    facts += [f"calibration error {100 * report.ece:.1f} points"] if report.ece is not None else []
    if report.aiq is not None and report.aiq_experts is not None:
        facts.append(f"AIQ {100 * report.aiq:.2f}, of the single experts {100 * report.aiq_experts:.2f}")
    facts += [f"{report.route_ms_p50:.1f} ms a decision"] if report.route_ms_p50 is not None else []
    facts += [f"refused {_percent(report.refused)}"] if report.refused else []
    facts += [f"{report.composition} of {report.calls:.2f} experts per query"] if report.composition != "single" else []
    if report.consistency is not None and report.consistency_whole is not None:
        labels = (report.consistency_by_variant or {}).items()
        each = f" ({', '.join(f'{label} {_percent(share)}' for label, share in labels)})" if labels else ""
        facts.append(
            f"same expert for {_percent(report.consistency)} of the variants{each}, for all variants of "
            f"{_percent(report.consistency_whole)} of the requests"
        )
    if report.target is not None:
        facts.append(
            f"cost weight solved in each fold: {', '.join(f'{cost_weight:.4g}' for cost_weight in report.cost_weights)}"
        )
    if report.cost_saved is not None and report.cost_saved_ci95_low is not None and any(report.cost_weights):
        low, high = report.cost_saved_ci95_low, report.cost_saved_ci95_high
        facts.append(f"saved {_percent(report.cost_saved)} [{_percent(low)}, {_percent(high)}]")
    if report.apgr is not None:
        facts.append(f"APGR {report.apgr:.3f}, CPT50 {_percent(report.cpt50)}, CPT80 {_percent(report.cpt80)}")
    stdout_console().print(f"{report.router} {'; '.join(facts)}", markup=False, highlight=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], OnProgress]]:
    """Progress bars on stderr, one per name, shown while the callback reports unfinished work."""
    with progress(transient=True) as shown:

        def bar(name: str) -> OnProgress:
            tasks: list[Task] = []

            def on_progress(done: int, total: int) -> None:
                if not tasks and done < total:
                    tasks.append(shown.add(name, total))
                if tasks:
                    tasks[0].update(completed=done, total=total)
                if tasks and done >= total:
                    tasks.pop().remove()

            return on_progress

        yield bar


@contextmanager
def encoding_progress() -> Iterator[OnProgress]:
    """A progress bar on stderr, shown while texts are encoded."""
    with progress_bars() as bar:
        yield bar("encoding prompts")


@contextmanager
def warnings_on_console() -> Iterator[None]:
    """Print the warnings of routers without file names and line numbers, each one once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False)


def parse_required(texts: Sequence[str], *, of: type[Any] | None = None) -> dict[str, float]:
    """figure -> lower bound, from `FIGURE:LOW` texts.

    Args:
        of: dataclass whose numeric fields are the figures; `None` means `RouterReport`.

    Raises:
        typer.BadParameter: a text of another form, or an unknown figure.
    """
    required, known = {}, _figures(of) if texts else []
    for text in texts:
        name, _, low = text.rpartition(":")
        if name not in known:
            raise typer.BadParameter(f"{text!r} is not FIGURE:LOW; figures: {', '.join(known)}", param_hint="--require")
        try:
            required[name] = float(low)
        except ValueError as error:
            raise typer.BadParameter(f"{low!r} is not a number", param_hint="--require") from error
    return required


def check_required(reports: Sequence[RouterReport | Comparison], required: Mapping[str, float]) -> None:
    """Exit with 1 if a required figure is below its bound or missing."""
    failed = False
    for report in reports:
        for name, low in required.items():
            value = getattr(report, name)
            if value is None or value < low:
                failed = True
                console.print(f"[bold red]required:[/] {escape(report.router)}: {name} is {value}, not >= {low:g}")
    if failed:
        raise typer.Exit(1)


def _figures(of: type[Any] | None) -> list[str]:
    from routers.evaluation.report import RouterReport

    return [f.name for f in fields(of or RouterReport) if f.type in ("float", "float | None", "int")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def per_thousand(cost: float | None) -> str:
    """A cost in USD per 1,000 queries."""
    return "-" if cost is None else f"{1e3 * cost:.4f}"
