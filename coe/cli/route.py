"""`coe route`: which expert a saved router gives a query to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.route_report import decision_document, print_explanation
from coe.cli.router_options import Dial, names_of, tell_of_truncation
from coe.cli.router_report import warnings_on_console


def route(
    text: Annotated[str, typer.Argument(help="The query.")],
    router: Annotated[Path, typer.Option("--router", help="Folder of a saved router.")],
    explain: Annotated[bool, typer.Option("--explain", help="Show what the router thinks of every expert.")] = False,
    allowed: Annotated[str | None, typer.Option("--allowed", metavar="A,B", help="Only these may answer.")] = None,
    dial: Dial = None,
    json: JsonTarget = None,
) -> None:
    """Say which expert a saved router gives a query to; no expert is loaded or asked."""
    from routers.artifacts import load
    from routers.base import Query
    from routers.decide import Utility, decide

    with warnings_on_console():
        loaded = load(router)
    estimate = loaded.router.estimate([Query.of(text)])
    utility = Utility(dial=loaded.meta.dial if dial is None else dial)
    (decision,) = decide(estimate, utility=utility, allowed=names_of(allowed), k=len(estimate.experts))
    encodes = getattr(loaded.router, "encoder", None)
    if encodes is not None:
        tell_of_truncation(encodes, [text])
    if json != "-":
        stdout_console().print(decision.experts[0] if decision.experts else "nobody", highlight=False, markup=False)
        if explain:
            print_explanation(estimate, decision)
    emit_json(decision_document(estimate, decision), json)
