"""The experts of a registry as a simulation sees them."""

from __future__ import annotations

from coe.errors import ConfigError
from coe.scheduler import Residency
from registry.store import Snapshot


def registered_experts(snapshot: Snapshot) -> tuple[dict[str, Residency], dict[str, int]]:
    """Expert -> its residency, and weights -> their bytes; experts without weights here (remote ones) are left out.

    Raises:
        ConfigError: no expert has weights of a known size.
    """
    residencies: dict[str, Residency] = {}
    bytes_of: dict[str, int] = {}
    for name, spec in sorted(snapshot.experts.items()):
        keys = tuple(sorted(spec.residency_keys(snapshot.experts)))
        sizes = {key: snapshot.experts[key].size_bytes for key in keys}
        if keys and all(sizes.values()):
            residencies[name] = keys
            bytes_of |= {key: int(size or 0) for key, size in sizes.items()}
    if not residencies:
        raise ConfigError(
            "no expert of this configuration has weights of a known size: `coe registry apply` reads them"
        )
    return residencies, bytes_of
