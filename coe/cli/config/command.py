"""`coe config check`: is a configuration fit to serve."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.flags import CONFIG_FILE
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import progress
from coe.cli.registry import HashingProgress

if TYPE_CHECKING:
    from registry.errors import Problem

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check the configuration of a service."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration of the service (YAML).")] = Path(
        CONFIG_FILE
    ),
    json: JsonTarget = None,
) -> None:
    """Check the configuration of a service and all that it names; exit status 1 if anything is wrong.

    Checks every field, the experts files and the files of their models, the routers, and the experts that policies,
    fallbacks, compositions and pins name. All problems are listed at once, each with file, line and field. Files are
    read and hashed; nothing is downloaded and no model is loaded.
    """
    from coe.cli.config.check import check_config

    with progress(transient=True) as shown:
        hashing = HashingProgress(shown)
        found = check_config(file, on_expert=hashing.expert, on_bytes=hashing.bytes)
    if json != "-":
        for problem in found.problems:
            print_problem(problem, "[bold red]wrong:[/]")
        for note in found.notes:
            print_problem(note, "[yellow]note:[/]")
        if not found.problems:
            counts = f"{len(found.experts)} experts, policies {', '.join(found.policies) or 'none'}"
            stdout_console().print(f"{file} is valid: {counts}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"Try it: coe chat --config {file}", highlight=False, markup=False, soft_wrap=True)
    emit_json(
        {
            "file": str(file),
            "valid": not found.problems,
            "problems": documents(found.problems),
            "notes": documents(found.notes),
            "experts": found.experts,
            "policies": found.policies,
        },
        json,
    )
    if found.problems:
        raise typer.Exit(1)


def documents(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Problems as JSON; `line` and `field` are null where a problem has none."""
    return [
        {"file": one.file, "line": one.line or None, "field": one.field or None, "message": one.message}
        for one in problems
    ]


def print_problem(problem: Problem, label: str) -> None:
    """One problem on stderr, with its place."""
    from rich.markup import escape

    console.print(f"{label} {escape(str(problem))}", highlight=False, soft_wrap=True)
