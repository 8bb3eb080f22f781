"""How reports are shown: tables, plots, JSON; the encoding bar, warnings, and figures that are required."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from coe.cli.output import console, stdout_console
from coe.cli.progress import Task, progress

if TYPE_CHECKING:
    from rich.table import Table

    from routers.evaluation.compare import Comparison
    from routers.evaluation.report import RouterReport

OnProgress = Callable[[int, int], None]
"""Called with what is done, and what there is to do."""


def print_reports(reports: Sequence[RouterReport], *, title: str) -> None:
    """A table with a row a router, and the marks that they are measured by, from worst to best."""
    from rich import box
    from rich.table import Table

    queries = f"{title}: {reports[0].n_queries:,} queries, {reports[0].n_experts} experts"
    table = Table(title=queries, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", min_width=14)
    for heading in ("accuracy", "over best single", "gap", "USD / 1k", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, report in enumerate(reports):
        if index and not _agree(report.baselines, reports[index - 1].baselines):
            _add_marks(table, reports[index - 1])
        _add_router(table, report)
    _add_marks(table, max(reports, key=lambda report: len(report.baselines)) if _all_agree(reports) else reports[-1])
    stdout_console().print(table)
    for report in reports:
        _print_use(report)


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two routers were measured by the same marks, one of them perhaps by more."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def _all_agree(reports: Sequence[RouterReport]) -> bool:
    return all(_agree(report.baselines, reports[0].baselines) for report in reports)


def _add_router(table: Table, report: RouterReport) -> None:
    gain = "-"
    if report.gain_over_best_single is not None:
        low, high = report.gain_ci95_low or 0.0, report.gain_ci95_high or 0.0
        gain = f"{100 * report.gain_over_best_single:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    table.add_row(
        f"[bold]{_escape(report.router)}[/]",
        f"[bold]{100 * report.accuracy:.2f}%[/]",
        gain,
        _percent(report.gap_recovered),
        per_thousand(report.mean_cost),
        _percent(report.cost_saved),
    )


def _add_marks(table: Table, report: RouterReport) -> None:
    table.add_section()
    for name, accuracy in sorted(report.baselines.items(), key=lambda item: item[1]):
        gain = "-" if report.best_single is None else f"{100 * (accuracy - report.best_single):+.2f}"
        cost, single = report.baseline_costs[name], report.best_single_cost
        saved = "-" if cost is None or not single else _percent(1 - cost / single)
        row = (name.replace("_", " "), f"{100 * accuracy:.2f}%", gain, "", per_thousand(cost), saved)
        table.add_row(*row, style="dim")
    table.add_section()


def _print_use(report: RouterReport) -> None:
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(report.expert_use.items())[:6])
    more = len(report.expert_use) - 6
    facts = [f"asked {shares}{f' and {more} more' if more > 0 else ''}", f"abstained on {_percent(report.abstained)}"]
    facts += [f"calibration error {100 * report.ece:.1f} points"] if report.ece is not None else []
    if report.aiq is not None and report.aiq_experts is not None:
        facts.append(f"AIQ {100 * report.aiq:.2f}, of the single experts {100 * report.aiq_experts:.2f}")
    facts += [f"{report.route_ms_p50:.1f} ms a decision"] if report.route_ms_p50 is not None else []
    facts += [f"refused {_percent(report.refused)}"] if report.refused else []
    facts += [f"{report.composition} of {report.calls:.2f} experts a query"] if report.composition != "single" else []
    if report.target is not None:
        facts.append(
            f"cost weight solved in each fold: {', '.join(f'{cost_weight:.4g}' for cost_weight in report.cost_weights)}"
        )
    if report.cost_saved is not None and report.cost_saved_ci95_low is not None and any(report.cost_weights):
        low, high = report.cost_saved_ci95_low, report.cost_saved_ci95_high
        facts.append(f"saved {_percent(report.cost_saved)} [{_percent(low)}, {_percent(high)}]")
    if report.apgr is not None:
        facts.append(f"APGR {report.apgr:.3f}, CPT50 {_percent(report.cpt50)}, CPT80 {_percent(report.cpt80)}")
    line = f"{report.router} {'; '.join(facts)}"
    stdout_console().print(line, markup=False, highlight=False)


def report_documents(reports: Sequence[RouterReport], *, with_picks: bool) -> list[dict[str, Any]]:
    """The JSON form of reports; with the expert of each query where that is asked for."""
    documents = [report.to_json() for report in reports]
    if with_picks:
        for document, report in zip(documents, reports, strict=True):
            document["picks"] = report.picks()
    return documents


def draw(reports: Sequence[RouterReport], path: Path, *, title: str) -> None:
    """Draw reports to a PNG file, and say so."""
    from routers.evaluation.plots import draw_reports

    draw_reports(reports, path, title=title)
    console.print(f"drew {path}", highlight=False, markup=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], OnProgress]]:
    """Progress on stderr: one task for each name, shown while its callback reports unfinished work."""
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
    """A bar on stderr that appears when texts have to be encoded."""
    with progress_bars() as bar:
        yield bar("encoding prompts")


@contextmanager
def warnings_on_console() -> Iterator[None]:
    """Show the routers' own warnings as notices for people, without file names and line numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):  # once, not once a fold
                console.print(f"[yellow]warning:[/] {_escape(message)}", highlight=False)


def parse_required(texts: Sequence[str], *, of: type[Any] | None = None) -> dict[str, float]:
    """`figure:low` pairs of a report, or of another class of figures.

    Raises:
        typer.BadParameter: not of that form, or a figure that reports do not have.
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
    """Exit with 1 when a report has a figure below what is required, or has not got it."""
    failed = False
    for report in reports:
        for name, low in required.items():
            value = getattr(report, name)
            if value is None or value < low:
                failed = True
                console.print(f"[bold red]required:[/] {_escape(report.router)}: {name} is {value}, not >= {low:g}")
    if failed:
        raise typer.Exit(1)


def _figures(of: type[Any] | None) -> list[str]:
    from routers.evaluation.report import RouterReport

    return [f.name for f in fields(of or RouterReport) if f.type in ("float", "float | None", "int")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def per_thousand(cost: float | None) -> str:
    """USD for a thousand queries."""
    return "-" if cost is None else f"{1e3 * cost:.4f}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
