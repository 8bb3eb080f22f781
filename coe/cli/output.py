"""What every command shares: where results, progress and errors go.

Results go to stdout, everything else (progress, plans, errors) to stderr, so that pipes stay clean.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from coe.seam import visible

console = Console(stderr=True, emoji=False)
"""Progress, notices and errors."""

JsonTarget = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH|-", help="Write the result as JSON to PATH, or to stdout with '-'."),
]


def stdout_console() -> Console:
    """A console on today's stdout: results for people."""
    return Console(file=sys.stdout, emoji=False)


def show_answer(text: str) -> None:
    """Stream the text of a model to stdout. A terminal shows its control characters instead of acting on them."""
    typer.echo(visible(text) if sys.stdout.isatty() else text, nl=False, color=True)  # a pipe gets it whole


def emit_json(value: Any, target: str | None) -> None:
    """Write `value` as JSON to the file `target`, to stdout for "-", nowhere for None.

    NaN becomes null: JSON has no NaN, and a figure that cannot be computed is null by contract. A target that is not a
    regular file (a device, a FIFO) is written to, never replaced.
    """
    if target is None:
        return
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    if target == "-":
        typer.echo(text)
        return
    path = Path(target)
    if path.exists() and not path.is_file():
        _write_through(path, text + "\n")
        return
    from registry.storage import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _write_through(path: Path, text: str) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # an error of a write does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _plain(value: Any) -> Any:
    """JSON-ready form of pydantic models, dataclasses, NumPy scalars and arrays, sets and paths."""
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value
