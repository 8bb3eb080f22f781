"""How routers are shown: report tables, an explained decision, the encoding bar, warnings, required figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer

from coe.cli.output import console, stdout_console

if TYPE_CHECKING:
    from rich.table import Table

    from routers.base import Estimate, RoutingDecision
    from routers.report import RouterReport


def print_reports(reports: Sequence[RouterReport], *, title: str) -> None:
    """A table with a row a router, and the marks that they are measured by, from worst to best."""
    from rich import box
    from rich.table import Table

    queries = f"{title}: {reports[0].n_queries:,} queries, {reports[0].n_experts} experts"
    table = Table(title=queries, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("accuracy", "over best single", "gap", "USD / 1k", "ms p50"):
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
        _per_thousand(report.mean_cost),
        "-" if report.route_ms_p50 is None else f"{report.route_ms_p50:.1f}",
    )


def _add_marks(table: Table, report: RouterReport) -> None:
    table.add_section()
    for name, accuracy in sorted(report.baselines.items(), key=lambda item: item[1]):
        gain = "-" if report.best_single is None else f"{100 * (accuracy - report.best_single):+.2f}"
        cost = _per_thousand(report.baseline_costs[name])
        table.add_row(name.replace("_", " "), f"{100 * accuracy:.2f}%", gain, "", cost, "", style="dim")
    table.add_section()


def _print_use(report: RouterReport) -> None:
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(report.expert_use.items())[:6])
    more = len(report.expert_use) - 6
    tail = f" and {more} more" if more > 0 else ""
    stdout_console().print(
        f"{report.router} asked {shares}{tail}; abstained on {_percent(report.abstained)}; "
        f"calibration error {100 * report.ece:.1f} points",
        markup=False,
        highlight=False,
    )


def decision_document(estimate: Estimate, decision: RoutingDecision) -> dict[str, Any]:
    """JSON form of one decision, with the estimate that it was made from."""
    costs = estimate.cost_usd
    return {
        "expert": decision.experts[0],
        "experts": list(decision.experts),
        "scores": list(decision.scores),
        "confidence": decision.confidence,
        "label": decision.label,
        "abstained": decision.abstained,
        "reason": decision.reason,
        "truncated": decision.truncated,
        "ood": None if estimate.ood is None else float(estimate.ood[0]),
        "quality": dict(zip(estimate.experts, estimate.quality[0].tolist(), strict=True)),
        "cost_usd": None if costs is None else dict(zip(estimate.experts, costs[0].tolist(), strict=True)),
    }


def print_explanation(estimate: Estimate, decision: RoutingDecision) -> None:
    """Why: the category, the confidence, and every expert's expected score and cost, best first."""
    from rich.table import Table

    out = stdout_console()
    facts: dict[str, Any] = {"category": decision.label, "confidence": f"{decision.confidence:.3f}"}
    if estimate.ood is not None:
        facts["unlike training"] = f"{float(estimate.ood[0]):.3f}"
    facts["abstained"] = "yes, so the generalist answers" if decision.abstained else None
    facts["truncated"] = "yes: the prompt is longer than the encoder reads" if decision.truncated else None
    facts["reason"] = decision.reason or None
    for name, value in facts.items():
        if value is not None:
            out.print(f"{name:>16}: {value}", markup=False, highlight=False)
    utilities = dict(zip(decision.experts, decision.scores, strict=True))
    table = Table("expert", "expected score", "USD / 1k", "utility")
    rows = sorted(
        range(len(estimate.experts)),
        key=lambda m: (-utilities.get(estimate.experts[m], -9e99), -estimate.quality[0, m]),
    )
    for m in rows:
        name = estimate.experts[m]
        cost = None if estimate.cost_usd is None else float(estimate.cost_usd[0, m])
        utility = f"{utilities[name]:.4f}" if name in utilities else "not eligible"
        chosen = name == decision.experts[0]
        table.add_row(
            _escape(name), f"{estimate.quality[0, m]:.4f}", _per_thousand(cost), utility, style="bold" if chosen else ""
        )
    out.print(table)


@contextmanager
def encoding_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that appears when texts have to be encoded."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding prompts", total=None, visible=False)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=done < total)

        yield on_progress


@contextmanager
def warnings_on_console() -> Iterator[None]:
    """Show the routers' own warnings as notices for people, without file names and line numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                console.print(f"[yellow]warning:[/] {_escape(str(warning.message))}", highlight=False)


def parse_required(texts: Sequence[str]) -> dict[str, float]:
    """`figure:low` pairs.

    Raises:
        typer.BadParameter: not of that form, or a figure that reports do not have.
    """
    required = {}
    for text in texts:
        name, _, low = text.rpartition(":")
        if name not in _figures():
            raise typer.BadParameter(
                f"{text!r} is not FIGURE:LOW; figures: {', '.join(_figures())}", param_hint="--require"
            )
        try:
            required[name] = float(low)
        except ValueError as error:
            raise typer.BadParameter(f"{low!r} is not a number", param_hint="--require") from error
    return required


def check_required(reports: Sequence[RouterReport], required: Mapping[str, float]) -> None:
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


def _figures() -> list[str]:
    from routers.report import RouterReport

    return [f.name for f in fields(RouterReport) if f.type in ("float", "float | None", "int")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _per_thousand(cost: float | None) -> str:
    return "-" if cost is None else f"{1e3 * cost:.4f}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
