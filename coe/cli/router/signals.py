"""Signals that a router requires: added to the table it is trained or scored on, or to a query."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.registry_url import RegistryUrl

if TYPE_CHECKING:
    from coe.signals.features import Signals
    from routers.base import Query
    from routers.outcomes.table import OutcomeTable

SignalConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Configuration of the service (YAML) whose experts compute the signals that a router requires; "
        "by default the experts of the registry.",
    ),
]


@dataclass(frozen=True)
class SignalOptions:
    """Which experts compute signals: those of a service's configuration, or of a registry."""

    config: SignalConfig = None
    registry: RegistryUrl = None

    def add_to(
        self, table: OutcomeTable, names: Collection[str], on_progress: Callable[[int, int], None]
    ) -> OutcomeTable:
        """The table with the named signals as features; the table itself if there are no names.

        Raises:
            ConfigError: a name is no signal of a registered expert, or the configuration is invalid.
            EngineError: an expert failed.
        """
        if not names:
            return table
        with _signals(self.config, self.registry) as signals:
            return signals.add_features(table, names, on_progress=on_progress)


def query_with_signals(
    query: Query, names: Collection[str], *, config: Path | None = None, url: str | None = None
) -> Query:
    """The query with the named signals as features; keywords that cannot be read are empty, which is logged.

    Raises:
        ConfigError: a name is no signal of a registered expert, or the configuration is invalid.
        EngineError: an expert failed.
    """
    if not names:
        return query
    with _signals(config, url) as signals:
        return signals.fill([query], names)[0]


def _signals(config: Path | None, url: str | None) -> Signals:
    from coe.config import Config, load_config
    from coe.experts import open_snapshot
    from coe.signals.features import Signals

    service = Config(registry=url) if config is None else load_config(config)
    return Signals(open_snapshot(service), service.engines)
