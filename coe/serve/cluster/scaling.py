"""Autoscaling by the requests in flight that processes count themselves: Ray Serve counts those that pass through it.

Ray's controller loads this module by value, so it imports nothing of `coe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

IN_FLIGHT: Final = "in_flight"
"""Name of the count, in what `record_autoscaling_stats` of a process returns."""


def by_requests_in_flight(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """The processes that are needed for the target; Ray applies the bounds, delays and factors of the configuration."""
    counts, config = context.aggregated_metrics or {}, context.config
    assert config is not None
    return sum(counts.get("in_flight", {}).values()) / config.target_ongoing_requests, {}
