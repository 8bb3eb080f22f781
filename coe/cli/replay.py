"""`coe replay`: re-run logged routing decisions and check that they are identical."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import progress

if TYPE_CHECKING:
    from rich.table import Table

    from coe.serve.decisions.entry import Entry
    from coe.serve.decisions.replay import ReplayReport, Rerouter

_MOST_SHOWN = 20
_SHOW_EVERY = 1000


def replay(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG...", help="Decision logs: files, or folders of files.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Also route the logged texts (`serve.log.texts`) by this configuration (YAML).",
        ),
    ] = None,
    json_target: JsonTarget = None,
) -> None:
    """Re-run logged routing decisions and check that they are identical; exit status 1 if any differs.

    Each decision is made again from its logged inputs. With --config, the logged texts are also routed by the service
    as it is configured today, which shows what would change.
    """
    from coe.serve.decisions.log import read_log
    from coe.serve.decisions.replay import replay as make_again

    cut: list[str] = []
    rerouter = None if config is None else _rerouter(config)
    replayed = make_again(_told(read_log(logs, cut.append)), rerouter)
    for place in cut:
        console.print(f"{place}: the last line is incomplete and was skipped", highlight=False, soft_wrap=True)
    if json_target != "-":
        _print(replayed, rerouter)
    emit_json(_document(replayed, rerouter, cut), json_target)
    if replayed.differing:
        raise typer.Exit(1)


def _rerouter(config: Path) -> Rerouter:
    """The experts and policies of a configuration, as a service would have them now."""
    from coe.config import load_config
    from coe.experts import open_snapshot
    from coe.local import build_policies
    from coe.serve.cluster.catalog import Catalog
    from coe.serve.decisions.replay import Rerouter
    from coe.signals.features import Signals

    settings = load_config(config)
    catalog = Catalog.of(settings, open_snapshot(settings))
    signals = Signals(catalog.snapshot, settings.engines)
    return Rerouter(build_policies(catalog.policies, catalog.snapshot, signals), catalog.snapshot)


def _told(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries, with their count as progress."""
    with progress(transient=True) as shown:
        task = shown.add("replayed entries")
        for count, entry in enumerate(entries, start=1):
            if count % _SHOW_EVERY == 0:
                task.update(completed=count)
            yield entry


def _print(replayed: ReplayReport, rerouter: Rerouter | None) -> None:
    output = stdout_console()
    output.print(_counts(replayed))
    if replayed.differences:
        output.print(_differences(replayed))
    if rerouter is not None:
        output.print(_rerouted(rerouter))
        for count, why in (
            (rerouter.without_text, "were logged without their text"),
            (rerouter.unknown_policy, "belong to policies that the configuration does not have"),
        ):
            if count:
                output.print(f"{count:,} entries {why}: not routed", highlight=False)


def _counts(replayed: ReplayReport) -> Table:
    from rich.table import Table

    table = Table("entries", "", title=f"{replayed.entries:,} entries replayed", title_justify="left")
    rows = (
        (replayed.repeated, "decided identically"),
        (replayed.differing, "decided differently"),
        (replayed.named, "named their expert: no decision"),
        (replayed.refused, "failed before a decision"),
    )
    for count, what in rows:
        table.add_row(f"{count:,}", what)
    table.columns[0].justify = "right"
    return table


def _differences(replayed: ReplayReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    more = len(replayed.differences) - _MOST_SHOWN
    table = Table("place", "id", "field", "logged", "now", caption=f"and {more:,} more" if more > 0 else None)
    for column in table.columns:
        column.overflow = "fold"
    for each in replayed.differences[:_MOST_SHOWN]:
        table.add_row(*(escape(str(value)) for value in (each.place, each.id, each.field, each.logged, each.now)))
    return table


def _rerouted(rerouter: Rerouter) -> Table:
    from rich.table import Table

    table = Table(
        "policy", "routed again", "same choice", "same router", "no eligible expert", "largest change in quality"
    )
    for name, rerouted in sorted(rerouter.by_policy.items()):
        drift = "" if rerouted.largest_drift is None else f"{rerouted.largest_drift:.3g}"
        counts = (rerouted.routed, rerouted.same_choice, rerouted.same_router, rerouted.no_eligible_expert)
        table.add_row(name, *(f"{count:,}" for count in counts), drift)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _document(replayed: ReplayReport, rerouter: Rerouter | None, cut: list[str]) -> dict[str, Any]:
    rerouted = None
    if rerouter is not None:
        rerouted = {
            "policies": rerouter.by_policy,
            "without_text": rerouter.without_text,
            "unknown_policy": rerouter.unknown_policy,
        }
    fields = ("entries", "repeated", "differing", "named", "refused", "differences")
    return {**{name: getattr(replayed, name) for name in fields}, "cut": cut, "rerouted": rerouted}
