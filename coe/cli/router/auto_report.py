"""Output of `--kind auto`: candidates as they are tried, the scoreboard, the choice, the expected accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from coe.cli.output import console, stdout_console

if TYPE_CHECKING:
    from routers.factory import TrainableRouter
    from routers.kinds.auto.candidates import ScoreboardRow
    from routers.kinds.auto.router import AutoModel


def with_progress_lines(make: Callable[[], TrainableRouter]) -> Callable[[], TrainableRouter]:
    """The same factory; an `auto` router prints a line for each candidate that it has tried."""
    from routers.kinds.auto.router import AutoRouter

    def made() -> TrainableRouter:
        router = make()
        if isinstance(router, AutoRouter):
            router.on_progress = _print_candidate
        return router

    return made


def auto_document(router: TrainableRouter) -> dict[str, Any]:
    """What an `auto` router tried, chose and expects, as JSON values; empty for other kinds."""
    from routers.kinds.auto.router import AutoRouter

    if not isinstance(router, AutoRouter):
        return {}
    model = router.model
    board = [{**asdict(row), "candidate": str(row.candidate)} for row in model.scoreboard]
    return {"scoreboard": board, "choice": asdict(model.selection), "expected": asdict(model.expected)}


def print_choice(router: TrainableRouter) -> None:
    """Print the scoreboard of an `auto` router, best first, its choice, and its unbiased estimate."""
    from routers.kinds.auto.candidates import BASELINE_KIND
    from routers.kinds.auto.router import AutoRouter

    if not isinstance(router, AutoRouter):
        return
    out, model, expected = stdout_console(), router.model, router.model.expected
    out.print(_scoreboard(model))
    _print_skipped(model)
    out.print(f"chosen: {model.selection.reason}", markup=False, highlight=False)
    if all(model.scoreboard[member].candidate.kind == BASELINE_KIND for member in model.selection.members):
        out.print(
            "no router beats the best single expert on this table by more than chance, of those that were tried: every "
            "query goes to that expert. A router can still save cost: train one with --save-cost.",
            style="bold",
        )
    low, high = 100 * expected.gain_ci95_low, 100 * expected.gain_ci95_high
    out.print(
        f"expected on new queries: {100 * expected.score:.2f}%, {100 * expected.gain:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"over the best single expert ({100 * expected.best_single:.2f}%); measured on rows outside the selection",
        markup=False,
        highlight=False,
    )


def _scoreboard(model: AutoModel) -> Any:
    from rich import box
    from rich.table import Table

    weights = dict(zip(model.selection.members, model.selection.weights, strict=True))
    table = Table(title="candidates, on inner folds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("accuracy", "over best single", "seconds", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("candidate", overflow="fold")  # last, since long names wrap
    tried = [(row.score, number, row) for number, row in enumerate(model.scoreboard) if row.score is not None]
    for score, number, row in sorted(tried, key=lambda line: -line[0]):
        weight, style = (f"{weights[number]:.2f}", "bold") if number in weights else ("", "")
        table.add_row(*_figures(row, score), weight, escape(str(row.candidate)), style=style)
    return table


def _print_skipped(model: AutoModel) -> None:
    """Print how many candidates were tried, and why each of the others was not."""
    from rich.padding import Padding
    from rich.text import Text

    out = stdout_console()
    skipped = [row for row in model.scoreboard if row.score is None]
    n = len(model.scoreboard)
    out.print(f"tried {n - len(skipped)} of {n} candidates{'; skipped:' if skipped else ''}", highlight=False)
    for row in skipped:
        out.print(Padding(Text(f"{row.candidate}: {row.skipped}", overflow="fold"), (0, 0, 0, 2)))


def _figures(row: ScoreboardRow, score: float) -> tuple[str, str, str]:
    gain = "-"
    if row.gain is not None and row.gain_ci95_low is not None and row.gain_ci95_high is not None:
        gain = f"{100 * row.gain:+.2f} [{100 * row.gain_ci95_low:+.2f}, {100 * row.gain_ci95_high:+.2f}]"
    return f"{100 * score:.2f}%", gain, "-" if row.seconds is None else f"{row.seconds:.1f}"


def _print_candidate(row: ScoreboardRow) -> None:
    shown = f"skipped {row.candidate}: {row.skipped}"
    if row.score is not None:
        shown = f"tried {row.candidate}: {100 * row.score:.2f}%"
    console.print(shown, style="dim", markup=False, highlight=False)
