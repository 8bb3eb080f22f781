"""`coe latent probe`: where a label can be read from the hidden states of an expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.expert_profile import plain_table
from coe.cli.flags import SERVICE_CONFIG, Limit, Seed, ServiceConfig
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Progress, Task, progress, status

if TYPE_CHECKING:
    from rich.table import Table

    from coe.latent.probe.probe import ProbeReport, WordingReport
    from coe.latent.probe.rows import LabelledRow, Wording
    from coe.latent.states import Place


def probe(
    expert: Annotated[str, typer.Option("--expert", metavar="NAME", help="Registered expert: a model or an adapter.")],
    rows: Annotated[
        Path,
        typer.Option("--rows", metavar="FILE", help="Labelled rows, JSON lines: `prompt` or other fields, `label`."),
    ],
    config: ServiceConfig = SERVICE_CONFIG,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            help="Wording of the rows, such as '{word} = ': {name} is replaced by a field. Repeatable.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="NAME", help="Field with a wording of the rows; by default `prompt`. Repeatable."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="NAME", help="Field with the label; by default `label`, else `answer`."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="N,N",
            help="Layers to read, from 1; 0 is what the head reads; by default those at 50, 67, 83 and 100% of "
            "the depth.",
        ),
    ] = None,
    places: Annotated[
        str | None,
        typer.Option(
            "--places",
            metavar="A,B",
            help="last: the last prompt token; span: the end of each row's `word` or `span`; mean: of all tokens; by "
            "default all that the rows have.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Read the texts without the expert's chat template.")] = False,
    folds: Annotated[
        int, typer.Option("--folds", metavar="N", min=2, help="Number of random folds, stratified by label.")
    ] = 5,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="How often to repeat it with other folds.")
    ] = 1,
    limit: Limit = None,
    seed: Seed = 0,
    json: JsonTarget = None,
) -> None:
    """Find the layer and place at which a label can be read from an expert's hidden states.

    It needs no training: seconds to minutes for a few hundred rows. A composition by hidden states can only pass on
    what is readable. Rows of one `group`, else of one `word`, else of one text are never split between training and
    test.
    """
    from coe.config import load_config
    from coe.experts import open_snapshot
    from coe.latent.probe.probe import ProbeSettings
    from coe.latent.probe.probe import probe as run
    from coe.latent.probe.reading import reading
    from coe.latent.probe.rows import read_rows
    from coe.latent.states import StateReader

    settings = ProbeSettings(_numbers(layers), _places(places), folds, repeats, seed)
    labelled = read_rows(rows, label=label, limit=limit)
    wordings = _wordings(template, column, labelled)
    for wording in wordings:  # a missing field is reported before the expert is loaded
        for row in labelled:
            wording.prompt(row)
    loaded = load_config(config)
    snapshot = open_snapshot(loaded)
    with status(f"loading {expert}"):
        reader = StateReader.open(expert, snapshot, loaded.engines, raw=raw)
    with reader, progress(transient=True) as shown:
        report = run(reader, labelled, wordings, settings, on_progress=_Bars(shown).show)
    text = reading(report)
    if json != "-":
        _print(report, text)
    emit_json({**{name: getattr(report, name) for name in report.__dataclass_fields__}, "reading": text}, json)


class _Bars:
    """A bar for each piece of work that is reported."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, Task] = {}

    def show(self, what: str, done: int, total: int) -> None:
        """So many units of it are done."""
        from rich.markup import escape

        if what not in self._tasks:
            self._tasks[what] = self._shown.add(escape(what), total)
        self._tasks[what].update(completed=done)


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layers, such as 10,20,30", param_hint="--layers") from None


def _places(text: str | None) -> tuple[Place, ...]:
    from coe.latent.states import PLACES

    if text is None:
        return ()
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in PLACES]:
        raise typer.BadParameter(f"no place {unknown[0]!r}; there are {', '.join(PLACES)}", param_hint="--places")
    return tuple(place for place in PLACES if place in names)


def _wordings(
    templates: Sequence[str] | None, columns: Sequence[str] | None, rows: Sequence[LabelledRow]
) -> list[Wording]:
    from coe.latent.probe.rows import Wording

    if not templates and not columns and "prompt" not in rows[0].fields:
        some = ", ".join(list(rows[0].fields)[:8])
        raise typer.BadParameter(
            f"the rows have no field `prompt`, but {some}: give a wording, such as --template '{{word}} = '"
        )
    wordings = [Wording(text) for text in templates or ()]
    wordings += [Wording.of_column(name) for name in columns or ()]
    return list(dict.fromkeys(wordings)) or [Wording.of_column("prompt")]


def _print(report: ProbeReport, text: str) -> None:
    out = stdout_console()
    how = "raw text" if report.raw else "chat template"
    out.print(
        f"{report.expert}: {report.n_rows:,} rows of {report.n_groups:,} groups, {len(report.labels)} labels, "
        f"{report.n_layers} layers, {how}; {report.settings.folds} folds"
        + (f" x {report.settings.repeats}" if report.settings.repeats > 1 else ""),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    out.print(_table(report))
    out.print(f"accuracy in %; chance {100 * report.chance:.0f}, majority {100 * report.majority:.0f}", highlight=False)
    out.print(text, highlight=False, markup=False, soft_wrap=True)
    if report.n_rows < _FEW_ROWS:
        console.print(f"[yellow]{report.n_rows} rows: the intervals are wide; 100 or more tell more[/]")


_FEW_ROWS = 50


def _table(report: ProbeReport) -> Table:
    """One line a wording, one column a place, with the accuracy at each layer."""
    layers = "/".join(str(layer) if layer else "norm" for layer in report.settings.layers)
    table = plain_table("wording", "answer", "text", *(f"{place} {layers}" for place in report.settings.places), "")
    for wording in report.wordings:
        table.add_row(*_line(wording, report.settings.places))
    return table


def _line(wording: WordingReport, places: Sequence[Place]) -> list[str]:
    from rich.markup import escape

    from coe.seam import visible

    cells = []
    for place in places:
        figures = []
        for cell in wording.cells:
            if cell.place == place:
                figure = f"{100 * cell.found.accuracy:.0f}"
                figures.append(f"[bold]{figure}[/]" if cell == wording.best else figure)
        cells.append(" ".join(figures))
    answer = "-" if wording.answer is None else f"{100 * wording.answer.accuracy:.0f}"
    shown = escape(visible(wording.wording))
    return [shown, answer, f"{100 * wording.text.accuracy:.0f}", *cells, wording.verdict]
