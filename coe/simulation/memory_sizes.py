"""How much memory a workload needs: hits and waiting against bytes for weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Final

from coe.simulation.bound import fewest_loads
from coe.simulation.compare import Comparison
from coe.simulation.workload import Workload

MOST_SIZES: Final = 8


@dataclass(frozen=True, slots=True)
class MemorySize:
    """What a process with so many bytes for weights does with a workload.

    Attributes:
        hit_rate: share of the uses of weights that found them in memory, or on their way.
        best_hit_rate: that of Belady's policy (1966), which knows the future, on the order of arrival.
        ttft_p95_s: seconds from arrival to the first token, 95th percentile.
        longest_wait_s: the longest wait for admission.
    """

    device_bytes: int
    loads: int
    hit_rate: float
    best_hit_rate: float
    ttft_p95_s: float
    longest_wait_s: float

    def document(self) -> dict[str, Any]:
        """The size as JSON."""
        return asdict(self)


def sizes_to_try(workload: Workload, most: int = MOST_SIZES) -> list[int]:
    """From the largest residency to all weights that are used, where the most wanted ones fit; ascending."""
    used = {name for index in set(workload.wants) for name in workload.residencies[index]}
    order = sorted(used, key=lambda name: (-workload.shares[name], name))
    least = max(sum(workload.bytes_of[name] for name in workload.residencies[index]) for index in set(workload.wants))
    sums = list(accumulate(workload.bytes_of[name] for name in order))
    fitting = sorted({max(least, size_bytes) for size_bytes in sums})
    if len(fitting) <= most:
        return fitting
    steps = [round(step * (len(fitting) - 1) / (most - 1)) for step in range(most)]
    return [fitting[step] for step in steps]


def memory_sizes(comparison: Comparison, workload: Workload, sizes: Sequence[int]) -> Iterator[MemorySize]:
    """The scheduler and the eviction of a host on the workload, at each size.

    Raises:
        ConfigError: a residency does not fit a size.
    """
    order = [workload.residencies[index] for index in workload.wants]
    uses = sum(map(len, order))
    for size_bytes in sizes:
        machine = replace(comparison.machine, device_bytes=size_bytes)
        [row] = replace(comparison, machine=machine).rows(workload, ["ours"])
        best = fewest_loads(order, workload.bytes_of, size_bytes)
        yield MemorySize(
            size_bytes,
            row.loads,
            max(0.0, 1 - row.loads / uses),
            max(0.0, 1 - best / uses),
            row.ttft_p95_s,
            row.longest_wait_s,
        )
