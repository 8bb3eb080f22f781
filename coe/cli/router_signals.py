"""The signals that a router requires, beside the table that it is trained or scored on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from routers.outcomes import OutcomeTable


def with_signals(
    table: OutcomeTable, names: Collection[str], url: str | None, on_progress: Callable[[int, int], None]
) -> OutcomeTable:
    """The table with those features, read by the registered experts that they name; the table itself for none.

    Raises:
        ConfigError: a name is no signal of a registered model.
    """
    if not names:
        return table
    from coe.signals import Signals
    from registry.store import Registry

    with Registry(url) as store:
        snapshot = store.snapshot()
    return Signals(snapshot).add_features(table, names, on_progress=on_progress)
