"""The bytes of residencies, as the engines state them; nothing is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from coe.config import Config
from coe.errors import WeightsError
from coe.host import Host
from coe.hosting import open_host
from registry.spec import residency_names
from registry.store import Snapshot


def footprints(host: Host, residencies: Iterable[str]) -> dict[str, int | None]:
    """Bytes of each residency; None where its files do not state them."""
    sizes: dict[str, int | None] = {}
    for residency in sorted(set(residencies)):
        try:
            sizes[residency] = host.footprint(*residency_names(residency))
        except WeightsError:
            sizes[residency] = None
    return sizes


def residency_bytes(config: Config, snapshot: Snapshot) -> dict[str, int | None]:
    """Bytes of the residency of each expert, None where unknown."""

    async def found() -> dict[str, int | None]:
        async with open_host(config, snapshot) as host:
            return footprints(host, map(snapshot.residency, snapshot.experts))

    return asyncio.run(found())
