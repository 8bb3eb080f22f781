"""`coe alias set | list | history | delete`, `coe promote`, `coe rollback`: aliases in the database of a registry."""

from __future__ import annotations

import getpass
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry_url import RegistryUrl

if TYPE_CHECKING:
    from registry.snapshot import Alias

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="ALIAS", help="Name of the alias.")]


@app.command("set")
def set_alias(
    alias: Name,
    expert: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT[@VERSION]", help="The expert that it points to; by default its current version."
        ),
    ],
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Create an alias, or move it; requests may name it as `model`.

    It keeps the version that it names now while newer ones are registered. A running service serves both.
    """
    _point(alias, expert, registry, json, exists=None)


@app.command("list")
def list_aliases(registry: RegistryUrl = None, json: JsonTarget = None) -> None:
    """List the aliases, with the time and author of the last move of each."""
    from rich.markup import escape
    from rich.table import Table

    from registry.keys import shown_time
    from registry.store import Registry

    with Registry(registry) as store:
        snapshot = store.snapshot()
    aliases = [alias for _, alias in sorted(snapshot.aliases.items())]
    if json != "-":
        table = Table("alias", "expert", "current version", "moved", "by")
        for each in aliases:
            current = snapshot.experts[each.expert].version
            cells = (each.name, each.ref, str(current), shown_time(each.moved_at), each.moved_by)
            table.add_row(*map(escape, cells))
        stdout_console().print(table if aliases else "there are no aliases (`coe alias set ALIAS EXPERT`)")
    emit_json({"aliases": [asdict(alias) for alias in aliases]}, json)


@app.command()
def history(alias: Name, registry: RegistryUrl = None, json: JsonTarget = None) -> None:
    """List the moves of an alias, the oldest first, and which of them were undone."""
    from rich.markup import escape
    from rich.table import Table

    from registry.keys import shown_time
    from registry.store import Registry

    with Registry(registry) as store:
        moves = store.alias_moves(alias)
    if json != "-":
        table = Table("expert", "moved", "by", "undone", "undone by")
        for each in moves:
            undone = "" if each.undone_at is None else shown_time(each.undone_at)
            moved = (each.alias.ref, shown_time(each.alias.moved_at), each.alias.moved_by)
            table.add_row(*map(escape, (*moved, undone, each.undone_by or "")))
        stdout_console().print(table)
    emit_json({"moves": [asdict(move) for move in moves]}, json)


@app.command()
def delete(alias: Name, registry: RegistryUrl = None, json: JsonTarget = None) -> None:
    """Delete an alias and its history; requests that name it get 404."""
    from registry.store import Registry

    with Registry(registry) as store:
        deleted = store.delete_alias(alias)
    console.print(f"deleted {alias}, which pointed to {deleted.ref}", highlight=False, markup=False)
    emit_json(asdict(deleted), json)


def promote(
    alias: Name,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A version of its expert, EXPERT or EXPERT@VERSION.")],
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Move an alias to another version or another expert; `coe rollback` goes back."""
    _point(alias, target, registry, json, exists=True)


def rollback(alias: Name, registry: RegistryUrl = None, json: JsonTarget = None) -> None:
    """Undo the last move of an alias. A second rollback undoes the move before it."""
    from registry.store import Registry

    with Registry(registry) as store:
        moved = store.roll_back_alias(alias, by=_author(), now=time.time())
    _report(moved, json)


def _point(alias: str, target: str, registry: str | None, json: str | None, *, exists: bool | None) -> None:
    from registry.store import Registry

    with Registry(registry) as store:
        moved = store.point_alias(alias, target, by=_author(), now=time.time(), exists=exists)
    _report(moved, json)


def _report(alias: Alias, json: Any) -> None:
    console.print(f"{alias.name} points to {alias.ref}", highlight=False, markup=False)
    emit_json(asdict(alias), json)


def _author() -> str:
    """The user of this process, as the history of an alias names it."""
    try:
        return f"user {getpass.getuser()}"[:128]
    except (OSError, KeyError):  # a container without a user database
        return "a command"
