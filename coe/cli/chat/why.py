"""Why an expert answered: the decision of a policy, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from coe.cli.chat.answering import Answering
from coe.cli.output import console
from coe.cli.route.conversation import switch_text
from coe.seam import one_line

if TYPE_CHECKING:
    from rich.table import Table

_MOST_EXPERTS = 8
_MOST_LINES, _MOST_CHARACTERS, _MOST_NAME = 50, 2_000, 80


def print_why(answering: Answering) -> None:
    """The decision, the experts that were called, the estimates, tokens and cost, and the notes; on stderr."""
    try:
        lines = [one_line(line, _MOST_CHARACTERS) for line in _lines(answering)][:_MOST_LINES]
        estimate = answering.why.get("estimate") or {}
        table = _table(estimate, answering.why.get("asked") or ()) if len(estimate) > 1 else None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # an endpoint may send anything
        lines, table = [f"{answering.expert} answered; the explanation of the endpoint cannot be read"], None
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if table is not None:
        console.print(table)


def _lines(answering: Answering) -> Iterator[str]:
    why = answering.why
    decision = why.get("decision")
    if decision is None:
        yield f"{answering.expert} answered; the endpoint does not tell why"
    elif why.get("policy") is None:
        yield f"{answering.expert} answered: you named it"
    else:
        reason = f": {decision['reason']}" if decision.get("reason") else ""
        yield f"{answering.expert} answered: policy {why['policy']}, confidence {decision['confidence']:.2f}{reason}"
    read = why.get("conversation") or {}
    if read.get("previous") is not None:
        yield f"previous expert: {read['previous']}; {switch_text(read)}"
    if len(why.get("asked") or ()) > 1:
        yield f"called: {', '.join(why['asked'])}"
    if why.get("tokens") is not None:
        cost = "" if why.get("cost_usd") is None else f", ${why['cost_usd']:.2g}"
        yield f"{why['tokens']} tokens{cost}"
    for note in why.get("notes") or ():
        yield f"note: {note}"


def _table(estimate: Mapping[str, Mapping[str, float | None]], called: Any) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from coe.cli.router.report import per_thousand

    ranked = sorted(estimate.items(), key=lambda item: -(item[1]["quality"] or 0.0))
    more = len(ranked) - _MOST_EXPERTS
    table = Table("expert", "expected score", "USD / 1k", caption=f"and {more} more" if more > 0 else None)
    for name, values in ranked[:_MOST_EXPERTS]:
        quality = "-" if values["quality"] is None else f"{values['quality']:.3f}"
        style = "bold" if name in called else ""
        table.add_row(escape(one_line(name, _MOST_NAME)), quality, per_thousand(values["cost_usd"]), style=style)
    return table
