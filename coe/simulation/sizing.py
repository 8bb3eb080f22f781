"""How much a machine carries: the highest rate of requests, and the number of devices that a workload needs."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

import numpy as np

from coe.errors import ConfigError
from coe.simulation.compare import Comparison
from coe.simulation.workload import Workload

QUANTILE: Final = 0.95
"""Share of the requests whose first token must come within the limit."""
_CLOSE: Final = 1.02
"""Rates are found up to this factor."""


def capacity_per_s(
    comparison: Comparison, workload: Workload, watch: Callable[[float], None] = lambda per_s: None
) -> float:
    """The highest rate at which 95% of the requests have their first token within the limit under `ours`.

    Found by doubling and bisection, up to 2%; at most about the rate that full batches of one expert would allow.
    watch: called with each rate that is tried.

    Raises:
        ConfigError: an expert does not fit the device, or the limit is not kept at any rate.
    """
    machine = comparison.machine
    machine.check(workload)
    work_s = sum(map(machine.prompt_s, workload.prompt_tokens)) + sum(map(machine.new_s, workload.new_tokens))
    mean_s = work_s / len(workload)
    most = machine.places / mean_s * (1 if machine.shared else len(workload.bytes_of))
    low = high = 1e-3 / mean_s

    def keeps(per_s: float) -> bool:
        watch(per_s)
        first_s = comparison.run(workload.at_rate(per_s), "ours").first_s
        return bool(np.quantile(first_s, QUANTILE) <= comparison.ttft_limit_s)

    if not keeps(low):
        raise ConfigError(
            f"at {low:.2g} requests per second, more than 5% have no first token within {comparison.ttft_limit_s:g} s: "
            "raise --ttft-limit or --bandwidth"
        )
    while low == high < most:  # from below: an overloaded run takes longer
        high *= 2
        low = high if keeps(high) else low
    while high / low > _CLOSE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def devices_needed(
    comparison: Comparison,
    workload: Workload,
    watch: Callable[[int], None] = lambda devices: None,
    policy: str = "ours",
) -> int | None:
    """The fewest devices with which 95% of the requests have their first token within the limit; at most one an expert.

    Each expert is on one device: most wanted first, on the device with the least requests so far. None if one device
    an expert is not enough. Found by bisection, as if more devices were never worse.

    Raises:
        ConfigError: an expert does not fit the device.
    """
    comparison.machine.check(workload)

    def keeps(devices: int) -> bool:
        watch(devices)
        parts = (workload.of(names) for names in spread(workload, devices))
        first_s = [second for part in parts if len(part) for second in comparison.run(part, policy).first_s]
        return bool(np.quantile(first_s, QUANTILE) <= comparison.ttft_limit_s)

    low, high = 0, len(workload.residencies)
    if not keeps(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def spread(workload: Workload, devices: int) -> list[frozenset[str]]:
    """The first weights of the residencies on each device, by longest processing time first."""
    shares: dict[str, float] = {}
    for residency in workload.residencies:
        shares[residency[0]] = workload.shares[residency[0]]
    placed: list[set[str]] = [set() for _ in range(devices)]
    least = [(0.0, number) for number in range(devices)]
    heapify(least)
    for name in sorted(shares, key=lambda name: (-shares[name], name)):
        share, number = heappop(least)
        placed[number].add(name)
        heappush(least, (share + shares[name], number))
    return [frozenset(names) for names in placed]
