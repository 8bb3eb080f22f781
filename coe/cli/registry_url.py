"""The option --registry."""

from __future__ import annotations

from typing import Annotated

import typer

RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry",
        envvar="COE_REGISTRY",
        metavar="URL",
        help="Database URL of the registry; by default SQLite at $COE_HOME/registry.db.",
    ),
]
