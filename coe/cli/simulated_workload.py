"""The workloads of `coe simulate`: requests to synthetic experts, or to those of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from coe.config import Config
    from coe.simulation.arrivals import Arrivals
    from coe.simulation.workload import Workload


def largest_budget(config: Config) -> int | None:
    """The bytes for weights of a host, the largest of the pools; None where a pool takes what is free."""
    budgets = [config.host.budget if pool.budget is None else pool.budget for pool in config.serve.pools]
    known = [int(budget) for budget in budgets if budget is not None]
    return max(known) if known and len(known) == len(budgets) else None


def synthetic_workload(arrivals: Arrivals, count: int, size_bytes: int, zipf: float, seed: int) -> Workload:
    """Synthetic experts of one size: those that the arrivals name, else `count` by popularity."""
    from coe.simulation.arrivals import by_name, by_zipf
    from coe.simulation.workload import synthetic_experts

    if arrivals.experts:
        return by_name(arrivals, lambda name: (name,), dict.fromkeys(arrivals.experts, size_bytes))
    return by_zipf(arrivals, *synthetic_experts(count, size_bytes), zipf, seed)


def registered_workload(arrivals: Arrivals, config: Config, path: Path, zipf: float, seed: int) -> Workload:
    """The experts of a configuration; those of a log, else all by popularity, in the order of the configuration.

    Raises:
        typer.BadParameter: the log names experts that are not in the configuration, whose file is `path`.
    """
    from coe.experts import open_snapshot
    from coe.simulation.arrivals import by_name, by_zipf
    from coe.simulation.registered import registered_experts

    residencies, bytes_of = registered_experts(open_snapshot(config))
    if not arrivals.experts:
        return by_zipf(arrivals, list(residencies.values()), bytes_of, zipf, seed)
    if unknown := sorted(set(arrivals.experts) - set(residencies)):
        raise typer.BadParameter(f"experts of the log are not in {path}: {', '.join(unknown[:5])}", param_hint="--log")
    return by_name(arrivals, residencies.__getitem__, bytes_of)
