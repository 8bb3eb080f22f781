"""Which host holds which weights: an integer programme over the load of residencies, with replicas of hot ones.

Hosts are equal, with one budget of bytes each. A request can run on a host that has all weights of its residency, and
the load of a residency may be split over several such hosts. The programme places as much load as fits, then makes the
most loaded host as light as possible, then uses the least bytes. It is solved by HiGHS (through SciPy); beyond
`MOST_CELLS` pairs of residency and host, and where the solver finds nothing better in its time, weights go greedily to
the lightest host. `in_place` is the best plan that moves nothing, and `aligned` numbers the hosts of a plan so that the
fewest bytes move.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from coe.errors import ConfigError
from coe.scheduler import Residency

MOST_CELLS: Final = 5_000
MOST_HOSTS: Final = 1_000
_SECONDS: Final = 20.0
_GAP: Final = 0.005
_UNPLACED: Final = 100.0
_PER_BYTE: Final = 1e-3
"""Weights of the objective, beside 1 for the load of the most loaded host: of load that finds no host, and of all
bytes of all budgets. The first outweighs any balance; the second decides between plans of one balance."""


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Weights by host.

    Attributes:
        hosts: names of the weights on each host, ascending.
        loads: share of all load on each host, in [0, 1].
        missing: share of the load of residencies that are on no host; these load on demand.
        optimal: within 0.5% of the best plan; False for one that was made greedily or in too little time.
    """

    hosts: tuple[tuple[str, ...], ...]
    loads: tuple[float, ...]
    missing: float
    optimal: bool

    @property
    def copies(self) -> dict[str, int]:
        """On how many hosts each of the weights is."""
        names = [name for host in self.hosts for name in host]
        return {name: names.count(name) for name in sorted(set(names))}


def plan_hosts(
    load: Mapping[Residency, float],
    bytes_of: Mapping[str, int],
    n_hosts: int,
    budget_bytes: int,
    only: Sequence[Collection[str]] | None = None,
) -> HostPlan:
    """Place the weights of residencies on equal hosts.

    Args:
        load: seconds of work, or any measure of it, by residency; not negative.
        budget_bytes: bytes for weights on each host.
        only: the weights that each host may have; None: any.

    Raises:
        ConfigError: there is no load, or the number of hosts is not from 1 to `MOST_HOSTS`.
    """
    if not 1 <= n_hosts <= MOST_HOSTS:
        raise ConfigError(f"number of hosts: {n_hosts:,} is not between 1 and {MOST_HOSTS:,}")
    total = sum(load.values())
    if total <= 0:
        raise ConfigError("there is no load to place")
    fitting = {r: load[r] / total for r in sorted(load) if sum(bytes_of[name] for name in r) <= budget_bytes}
    if not fitting:
        return HostPlan(((),) * n_hosts, (0.0,) * n_hosts, 1.0, optimal=True)
    greedy = _greedy(fitting, bytes_of, n_hosts, budget_bytes, only)
    if len(fitting) * n_hosts > MOST_CELLS:
        return greedy
    plan = _solved(list(fitting), list(fitting.values()), bytes_of, n_hosts, budget_bytes, only)
    if plan is None or not (plan.optimal or _worth(plan) < _worth(greedy)):
        return greedy
    return plan


def in_place(
    load: Mapping[Residency, float], hosts: Sequence[Collection[str]], bytes_of: Mapping[str, int], budget_bytes: int
) -> HostPlan:
    """The best plan that moves nothing: of the weights that a host has now, those that its budget holds are in memory.

    Raises:
        ConfigError: as `plan_hosts`.
    """
    if any(sum(map(bytes_of.__getitem__, host)) > budget_bytes for host in map(set, hosts)):
        hosts = plan_hosts(load, bytes_of, len(hosts), budget_bytes, hosts).hosts
    return balanced(load, hosts)


def balanced(load: Mapping[Residency, float], hosts: Sequence[Collection[str]]) -> HostPlan:
    """The lightest loads with the weights that hosts have now, whatever their bytes.

    Raises:
        ConfigError: there is no load, or no host.
    """
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    total = sum(load.values())
    if total <= 0 or not hosts:
        raise ConfigError("there is no load to spread, or no host")
    residencies, sets = sorted(load), [set(host) for host in hosts]
    pairs = [
        (r, h) for r, residency in enumerate(residencies) for h, host in enumerate(sets) if host.issuperset(residency)
    ]
    names = tuple(tuple(sorted(host)) for host in sets)
    if not pairs:
        return HostPlan(names, (0.0,) * len(hosts), 1.0, optimal=True)
    # Variables: the load of each pair, and that of the most loaded host. Rows: residencies, then hosts.
    at_r, at_h = np.array(pairs).T
    n, first = len(pairs), len(residencies)
    rows = np.concatenate([at_r, first + at_h, np.arange(first, first + len(hosts))])
    columns = np.concatenate([np.arange(n), np.arange(n), np.full(len(hosts), n)])
    values = np.concatenate([np.ones(2 * n), np.full(len(hosts), -1.0)])
    upper = np.concatenate([[load[residency] / total for residency in residencies], np.zeros(len(hosts))])
    matrix = csr_array((values, (rows, columns)), shape=(first + len(hosts), n + 1))
    found = milp(np.append(np.full(n, -_UNPLACED), 1.0), constraints=LinearConstraint(matrix, ub=upper))
    loads = np.bincount(at_h, weights=found.x[:n], minlength=len(hosts))
    return HostPlan(names, tuple(map(float, loads)), max(0.0, 1.0 - float(loads.sum())), optimal=True)


def aligned(plan: HostPlan, hosts: Sequence[Collection[str]], bytes_of: Mapping[str, int]) -> HostPlan:
    """The plan, with its hosts in the order in which the most bytes stay where they are now.

    Args:
        hosts: names of the weights on each host now, as many as the plan has.
    """
    from scipy.optimize import linear_sum_assignment

    stays = [[sum(bytes_of.get(name, 0) for name in set(now) & set(then)) for then in plan.hosts] for now in hosts]
    _, order = linear_sum_assignment(np.array(stays, dtype=float), maximize=True)
    return replace(plan, hosts=tuple(plan.hosts[i] for i in order), loads=tuple(plan.loads[i] for i in order))


def _worth(plan: HostPlan) -> tuple[float, float]:
    return plan.missing, max(plan.loads)


def _solved(
    residencies: Sequence[Residency],
    shares: Sequence[float],
    bytes_of: Mapping[str, int],
    n_hosts: int,
    budget: int,
    only: Sequence[Collection[str]] | None,
) -> HostPlan | None:
    """Variables: y[name, host] in {0, 1}; x[residency, host] >= 0, load there; the load of the most loaded host."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    names = sorted({name for residency in residencies for name in residency})
    row_of = {name: number for number, name in enumerate(names)}
    n_y, n_x = len(names) * n_hosts, len(residencies) * n_hosts
    last = n_y + n_x  # the load of the most loaded host
    links = [(r, name) for r, residency in enumerate(residencies) for name in residency]
    matrix: Any = lil_matrix((len(residencies) + len(links) * n_hosts + 3 * n_hosts - 1, last + 1))
    upper = np.zeros(matrix.shape[0])
    row = 0
    for r, share in enumerate(shares):  # no more than its load is placed
        matrix[row, [n_y + r * n_hosts + h for h in range(n_hosts)]] = 1.0
        upper[row], row = share, row + 1
    for r, name in links:  # only where its weights are
        for h in range(n_hosts):
            matrix[row, n_y + r * n_hosts + h], matrix[row, row_of[name] * n_hosts + h] = 1.0, -shares[r]
            row += 1
    for h in range(n_hosts):
        for name in names:  # bytes, as a share of the budget
            matrix[row, row_of[name] * n_hosts + h] = bytes_of[name] / budget
        upper[row], row = 1.0, row + 1
        for r in range(len(residencies)):
            matrix[row, n_y + r * n_hosts + h] = 1.0
        matrix[row, last], row = -1.0, row + 1
    for h in range(n_hosts - 1 if only is None else 0):  # hosts are equal: of all their orders, that of descending load
        for r in range(len(residencies)):
            matrix[row, n_y + r * n_hosts + h + 1], matrix[row, n_y + r * n_hosts + h] = 1.0, -1.0
        row += 1
    sizes = np.repeat([bytes_of[name] / budget for name in names], n_hosts)
    may = np.ones(n_y) if only is None else np.array([float(name in only[h]) for name in names for h in range(n_hosts)])
    cost = np.concatenate([_PER_BYTE / n_hosts * sizes, np.full(n_x, -_UNPLACED), [1.0]])
    found = milp(
        cost,
        integrality=np.concatenate([np.ones(n_y), np.zeros(n_x + 1)]),
        bounds=Bounds(0, np.concatenate([may, np.full(n_x + 1, np.inf)])),
        constraints=LinearConstraint(matrix.tocsr(), ub=upper),
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP * 1 / (_UNPLACED * n_hosts)},
    )
    if found.x is None:
        return None
    placed = found.x[:n_y].reshape(len(names), n_hosts) > 0.5
    split = found.x[n_y:last].reshape(len(residencies), n_hosts)
    hosts = tuple(tuple(name for name in names if placed[row_of[name], h]) for h in range(n_hosts))
    loads = tuple(float(load) for load in split.sum(axis=0))
    return HostPlan(hosts, loads, max(0.0, 1.0 - sum(loads)), optimal=found.status == 0)


def _greedy(
    shares: Mapping[Residency, float],
    bytes_of: Mapping[str, int],
    n_hosts: int,
    budget_bytes: int,
    only: Sequence[Collection[str]] | None = None,
) -> HostPlan:
    """The most wanted residency first, on the lightest host that has room for what it lacks; one copy each."""
    hosts: list[set[str]] = [set() for _ in range(n_hosts)]
    left, loads, missing = [budget_bytes] * n_hosts, [0.0] * n_hosts, 1.0
    for residency, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        needs = [sum(bytes_of[name] for name in set(residency) - host) for host in hosts]
        may = [only is None or all(name in only[h] for name in residency) for h in range(n_hosts)]
        room = [h for h in range(n_hosts) if may[h] and needs[h] <= left[h]]
        if room:
            best = min(room, key=lambda h: (loads[h], needs[h], h))
            hosts[best] |= set(residency)
            left[best] -= needs[best]
            loads[best] += share
            missing -= share
    return HostPlan(tuple(tuple(sorted(host)) for host in hosts), tuple(loads), max(0.0, missing), optimal=False)
