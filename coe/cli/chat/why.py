"""Why an expert answered: the decision of a policy, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from coe.cli.chat.backends import Answering
from coe.cli.output import console

if TYPE_CHECKING:
    from rich.table import Table

_MOST_EXPERTS = 8


def print_why(answering: Answering) -> None:
    """The decision, the experts that were called, the estimates, tokens and cost, and the notes; on stderr."""
    for line in _lines(answering):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(estimate := answering.why.get("estimate") or {}) > 1:
        console.print(_table(estimate, answering.why.get("asked") or ()))


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
        table.add_row(escape(name), quality, per_thousand(values["cost_usd"]), style=style)
    return table
