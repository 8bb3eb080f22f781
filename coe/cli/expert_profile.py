"""What is known of one expert: its strengths and weaknesses by skill, as `coe registry show` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coe.cli.output import stdout_console

if TYPE_CHECKING:
    from rich.table import Table

    from registry.profiles import Profiles
    from registry.spec import ExpertSpec
    from registry.store import Registry

_SHOWN = 8
"""Most strengths, and most weaknesses, that are shown of an expert."""


def profile_document(spec: ExpertSpec, store: Registry) -> dict[str, Any] | None:
    """All that is known of what an expert is good at; `None` where nothing was ever measured."""
    from registry.digest import identity
    from registry.profiles import AGGREGATION, Profiles

    rows, known = store.recorded(spec.name), store.snapshot().experts
    if not rows:
        return None
    is_whole = all(name in known for name in spec.references)  # an earlier version's base may be gone
    own = identity(spec, known) if is_whole else None
    mine = [row for row in rows if row.identity == own]
    answers = Profiles.of_rows(row for row in mine if not row.source.startswith(AGGREGATION))
    trials = Profiles.of_rows(row for row in mine if row.source.startswith(AGGREGATION))
    total = answers.total(spec.name)
    return {
        "identity": own,
        "n": 0 if total is None else total.n,
        "accuracy": None if total is None else total.accuracy,
        "skills": _skills(answers, store.profiles(), spec.name),
        "aggregating": _skills(trials, store.profiles(aggregating=True), spec.name),
        "sources": {
            row.source: {"digest": row.digest, "n": sum(each.measure.n for each in mine if each.source == row.source)}
            for row in mine
        },
        "counts_of_other_content": sum(row.measure.n for row in rows if row.identity != own),
    }


def print_profile(name: str, document: dict[str, Any] | None) -> None:
    """Strengths and weaknesses, or how they come to be known."""
    out = stdout_console()
    if document is None or not document["sources"]:
        of_others = 0 if document is None else document["counts_of_other_content"]
        out.print(
            f"nothing was measured of {name} as it is: `coe profile --outcomes FILE` reads a table, "
            "`coe profile --config FILE --tasks NAMES` asks it"
            + (f" ({of_others:,} counts are of other versions)" if of_others else ""),
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    skills, half = document["skills"], (len(document["skills"]) + 1) // 2
    if skills:
        out.print(_skill_table("strongest", skills[: min(_SHOWN, half)]))
    if weak := skills[half:][::-1][:_SHOWN]:
        out.print(_skill_table("weakest", weak))
    if document["aggregating"]:
        out.print(_skill_table("aggregating others' answers", document["aggregating"][:_SHOWN]))
    out.print(_read_from(document), highlight=False, markup=False, soft_wrap=True)


def _skills(own: Profiles, everybody: Profiles, name: str) -> list[dict[str, Any]]:
    """The strengths of an expert, which may be one that was, beside those of the others as they are."""
    from registry.profiles import Profiles
    from registry.strengths import strengths

    others = {key: cell for key, cell in everybody.cells.items() if key[0] != name}
    found = strengths(Profiles({**others, **own.cells}), name)
    return [{field: getattr(one, field) for field in one.__dataclass_fields__} | {"lead": one.lead} for one in found]


def _skill_table(title: str, skills: Sequence[dict[str, Any]]) -> Table:
    from rich.markup import escape

    table = plain_table(title, "accuracy", "95%", "n", "others", "lead")
    for one in skills:
        others = "-" if one["others"] is None else f"{one['others']:.1%}"
        lead = "-" if one["lead"] is None else f"{100 * one['lead']:+.1f}"
        table.add_row(
            escape(one["skill"]),
            f"{one['accuracy']:.1%}",
            f"{one['low']:.1%} - {one['high']:.1%}",
            f"{one['n']:,}",
            others,
            lead,
        )
    return table


def _read_from(document: dict[str, Any]) -> str:
    read = ", ".join(f"{source} ({told['n']:,})" for source, told in document["sources"].items())
    mean = "" if document["accuracy"] is None else f"mean {document['accuracy']:.1%} of {document['n']:,} counts; "
    others = document["counts_of_other_content"]
    return f"{mean}measured by {read}" + (f"; {others:,} more counts are of other versions" if others else "")


def plain_table(first: str, *columns: str) -> Table:
    """A table without a frame: the first column and those of text to the left, figures to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in columns:
        text = column in ("strongest", "weakest", "aggregator")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text)
    return table
