"""`serve.placement`: the pools of a service, computed from the work that its decision log shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from coe.serve.cluster.pool_placement import PlacedPools

if TYPE_CHECKING:
    from coe.config import Config
    from coe.scheduler import Residency
    from coe.simulation.host_plan import HostPlan
    from registry.store import Snapshot

_MOST_REQUESTS = 200_000
"""Requests of a log that are read, those of the newest files first."""
_LEAST_REQUESTS = 100
"""Requests of a log for each host from which experts are placed by their work. A host's share of the work is then known
to about 10% (one standard deviation of n requests is 1/sqrt(n)), the gain for which experts move (`_HEAVIER`)."""
_MOST_NAMED = 3
"""Files left out that are named with the reason; the others are counted."""
_MISSING, _HEAVIER = 0.01, 1.1
"""What a running placement may be worse by and stays: the share of the work that fits no host, and the load of the
most loaded host, as a factor."""


def place_pools(config: Config, running: Config | None = None) -> PlacedPools:
    """The pools of `serve.placement`: a host each, with the experts that an integer programme places there.

    Without a decision log of `_LEAST_REQUESTS` for each host the bytes of the weights are spread evenly. Its damaged
    files are left out, which the lines state. Where pools run already, experts stay where they are unless the log has
    that many requests and shows that another placement is clearly better (`_keeps`); then the fewest bytes move.

    Args:
        running: the configuration whose pools run.

    Raises:
        ConfigError: `host.budget` is not set, or no expert has weights of a known size.
    """
    from coe.cli.plan_memory import experts_by_host
    from coe.errors import ConfigError
    from coe.experts import open_snapshot
    from coe.simulation.host_plan import aligned, in_place, plan_hosts
    from coe.simulation.registered import registered_experts

    placement = config.serve.placement
    assert placement is not None
    if config.host.budget is None:
        raise ConfigError("serve.placement needs `host.budget`: the bytes that each host has for weights")
    snapshot, budget = open_snapshot(config), int(config.host.budget)
    residencies, bytes_of = registered_experts(snapshot)
    load, how, left_out = _work(config, residencies)
    now = _experts_now(running, snapshot)
    runs = len(now) == placement.hosts
    if load is None and running is not None and runs:
        return keep_pools(config, running)
    if load is None:
        how = f"bytes spread evenly, since {how}"
        load = {residency: float(sum(map(bytes_of.__getitem__, residency))) for residency in residencies.values()}
    plan = plan_hosts(load, bytes_of, placement.hosts, budget)
    if runs:
        held = _weights(now, residencies)
        kept = in_place(load, held, bytes_of, budget)
        stays = replace(kept, hosts=tuple(tuple(sorted(host)) for host in held))
        plan = stays if _keeps(kept, plan) else aligned(plan, held, bytes_of)
    hosts = experts_by_host({"weights": plan.hosts, "loads": plan.loads}, residencies, snapshot, now)
    lines = [f"{how}{'' if plan.optimal else '; found greedily'}; {plan.missing:.1%} of it fits no host", *left_out]
    lines += [f"host-{n}: {', '.join(names) or 'none'} ({plan.loads[n]:.1%})" for n, names in enumerate(hosts)]
    return _pools(config, hosts, lines)


def keep_pools(config: Config, running: Config) -> PlacedPools:
    """The pools that run, with every expert where it is; computed at once.

    An expert that is new goes to the hosts that have its weights (an adapter to its base), else to the host with the
    fewest bytes of weights.

    Raises:
        ConfigError: no expert has weights of a known size.
    """
    from coe.cli.plan_memory import experts_by_host
    from coe.experts import open_snapshot
    from coe.simulation.registered import registered_experts

    snapshot = open_snapshot(config)
    residencies, bytes_of = registered_experts(snapshot)
    now = _experts_now(running, snapshot)
    held = _weights(now, residencies)
    for name in sorted({*snapshot}.difference(*now)):
        residency = residencies.get(name, ())
        if not any(host.issuperset(residency) for host in held if residency):
            lightest = min(range(len(held)), key=lambda n: (sum(map(bytes_of.__getitem__, held[n])), n))
            now[lightest].add(name)
            held[lightest].update(residency)
    hosts = experts_by_host({"weights": held, "loads": [0.0] * len(held)}, residencies, snapshot, now)
    return _pools(config, hosts, ())


def _experts_now(running: Config | None, snapshot: Snapshot) -> list[set[str]]:
    """The experts of each host that are registered; empty if none runs."""
    return [] if running is None else [{*(pool.experts or ())} & {*snapshot} for pool in running.serve.pools]


def _weights(hosts: Sequence[Collection[str]], residencies: Mapping[str, Residency]) -> list[set[str]]:
    """The weights that the experts of each host need."""
    return [{each for name in host if name in residencies for each in residencies[name]} for host in hosts]


def _pools(config: Config, hosts: Sequence[Collection[str]], lines: Sequence[str]) -> PlacedPools:
    """A pool for each host."""
    from coe.config import HostPoolConfig, ProcessConfig

    process = {name: getattr(config.serve.placement, name) for name in ProcessConfig.model_fields}
    pools = [HostPoolConfig(name=f"host-{n}", experts=tuple(sorted(names)), **process) for n, names in enumerate(hosts)]
    return PlacedPools(tuple(pools), tuple(lines))


def _keeps(now: HostPlan, best: HostPlan) -> bool:
    """Whether a placement is good enough to stay: a better one must be worth the loads of what it moves."""
    return now.missing <= best.missing + _MISSING and max(now.loads) <= _HEAVIER * max(best.loads)


def _work(config: Config, residencies: Mapping[str, Residency]) -> tuple[dict[Residency, float] | None, str, list[str]]:
    """The work of each residency in the log of `serve.placement`; None where it shows too little.

    Also how it was found, or why it is None, and lines on the files that were left out.
    """
    from coe.errors import ConfigError
    from coe.simulation.arrivals import log_files, read_answered
    from coe.simulation.logged_speeds import work_of

    placement = config.serve.placement
    assert placement is not None
    log, least = placement.log or config.serve.log.folder, _LEAST_REQUESTS * placement.hosts
    wanted: list[tuple[Residency, int, int]] = []
    damaged: list[str] = []
    files, left = [] if log is None else log_files(log), _MOST_REQUESTS
    for file in files:
        try:
            logged = read_answered(file, left)
        except ConfigError as error:
            damaged.append(f"left out of the log: {error}")
            continue
        left -= len(logged.at_s)
        requests = zip(logged.experts, logged.prompt_tokens, logged.new_tokens, strict=True)
        wanted += [(residencies[name], prompt, new) for name, prompt, new in requests if name in residencies]
        if left <= 0:
            break
    left_out = damaged[:_MOST_NAMED]
    if len(damaged) > _MOST_NAMED:
        left_out.append(f"left out of the log: {len(damaged) - _MOST_NAMED} more files")
    load = work_of(wanted)
    if len(wanted) >= least and sum(load.values()) > 0:
        return load, f"by the work in {log}", left_out
    shown = f"{log or 'serve.log.folder, which is null,'} shows"
    if not files:
        return None, f"{shown} no work: there is no file", left_out
    if len(damaged) == len(files):
        return None, f"{shown} no work: no file of it can be used", left_out
    if sum(load.values()) <= 0:
        return None, f"{shown} no work: no request to an expert with weights was answered", left_out
    few = f"{len(wanted):,} answered requests to experts with weights"
    return None, f"{shown} too little work: {few}, and {placement.hosts:,} hosts need {least:,}", left_out
