"""The signals that a router requires: beside the table that it is trained or scored on, or in a query."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coe.signals.signals import Signals
    from routers.base import Query
    from routers.outcomes.table import OutcomeTable

SignalConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="A service's YAML: where a router requires signals, its experts give them, on its engines; "
        "else those of the registry.",
    ),
]


def with_signals(
    table: OutcomeTable,
    names: Collection[str],
    on_progress: Callable[[int, int], None],
    *,
    config: Path | None = None,
    url: str | None = None,
) -> OutcomeTable:
    """The table with those features, read by the experts that they name; the table itself for none.

    Args:
        config: of the service whose experts they are; `None`: those of the registry at `url`.

    Raises:
        ConfigError: a name is no signal of a registered expert, or the configuration is wrong.
        EngineError: an expert failed.
    """
    if not names:
        return table
    with _signals(config, url) as signals:
        return signals.add_features(table, names, on_progress=on_progress)


def query_with_signals(
    query: Query, names: Collection[str], *, config: Path | None = None, url: str | None = None
) -> Query:
    """The query with those features; see `with_signals`. Keywords that cannot be read are none, which is logged."""
    if not names:
        return query
    with _signals(config, url) as signals:
        return signals.fill([query], names)[0]


def _signals(config: Path | None, url: str | None) -> Signals:
    from coe.config import Config, load_config
    from coe.experts import open_snapshot
    from coe.signals.signals import Signals

    service = Config(registry=url) if config is None else load_config(config)
    return Signals(open_snapshot(service), service.engines)
