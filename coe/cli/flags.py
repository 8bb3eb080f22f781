"""Flags and arguments that several commands share: one spelling, one text and one range for each."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

CONFIG_FILE = "coe.yaml"
"""The configuration that commands read without --config, in the current folder."""


def default_config(*, otherwise: str = "name a configuration with --config") -> Path:
    """The configuration in the current folder.

    Args:
        otherwise: the end of the error: what names a configuration, or takes its place.

    Raises:
        typer.BadParameter: there is none.
    """
    path = Path(CONFIG_FILE)
    if not path.is_file():
        raise typer.BadParameter(
            f"no {CONFIG_FILE} here: `coe init` writes one, or {otherwise}", param_hint="'--config' / '-c'"
        )
    return path


def _config(value: Path | None) -> Path:
    return default_config() if value is None else value


def out_option(text: str, *, metavar: str = "DIR") -> Any:
    """The option that names what a command writes; `text` is its help."""
    return typer.Option("--out", "--output", "-o", metavar=metavar, help=text)


def text_of(text: str) -> str:
    """The text of a `Text` argument: '-' reads stdin."""
    return sys.stdin.read() if text == "-" else text


CONFIG_HELP = f"Configuration of the service (YAML); by default {CONFIG_FILE} in the current folder."
ServiceConfig = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help=CONFIG_HELP, callback=_config)]
"""Give it the default `SERVICE_CONFIG`."""
SERVICE_CONFIG: Any = None
"""Typer reads no default; the callback of `ServiceConfig` supplies the path."""
Text = Annotated[str, typer.Argument(metavar="TEXT", help="The question; '-' reads it from stdin.")]
Allowed = Annotated[str | None, typer.Option("--allowed", metavar="A,B", help="Only these experts may answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0.0, max=2.0, help="Sampling temperature; 0 is greedy.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", metavar="N", min=1, help="Most new tokens of an answer; by default what fits, up to 512."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")]
SamplingSeed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Random seed.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Use only the first N questions or rows of each file."),
]
Concurrency = Annotated[
    int, typer.Option("--concurrency", metavar="N", min=1, help="Most questions in flight at once.")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the key of an endpoint."),
]
TASKS_HELP = "names, looked up in configs/tasks and in tasks/ beside the configuration; YAML files; or folders of them."


LEAST_BYTES: Final = 2**20
"""Fewest bytes of weights, or of memory for them: fewer are a number whose unit was forgotten."""
LEAST_BYTES_PER_S: Final = 2**10
"""The same for bytes per second."""


def rate_of_text(text: str, option: str) -> float:
    """Bytes per second of a rate such as `55GB/s` or `500MB`. Raises as `bytes_of_text`."""
    return bytes_of_text(text.removesuffix("/s"), option, least=LEAST_BYTES_PER_S, suffix="/s")


def bytes_of_text(text: str, option: str, *, least: int = LEAST_BYTES, suffix: str = "") -> float:
    """The number of a size such as `13.5GB` or `1.5GiB`.

    Args:
        least: fewest bytes. suffix: of the unit, for messages.

    Raises:
        typer.BadParameter: it is no number of bytes, or fewer than `least`.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        value = float(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        value = -1.0
    if value < 1:
        example = f"13.5GB{suffix}"
        raise typer.BadParameter(f"{text[:60]!r} is no number of bytes above 0, such as {example}", param_hint=option)
    if value < least:
        number = re.match(r"[\d.]*", text.strip())
        meant = f"{number[0] if number else ''}GB{suffix}"
        unit = "KiB" if least < 2**20 else "MiB"
        raise typer.BadParameter(
            f"{value:,.0f} bytes{suffix} is less than 1 {unit}{suffix}; did you mean {meant}?", param_hint=option
        )
    return value
