"""A weighted mean of several routers' estimates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routers.base import Estimate, Floats


def blend(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted mean of qualities and costs, for the same queries and experts in the same order.

    Costs are averaged over the estimates that have them; `ood` and labels come from the first estimate that has any, so
    the one of largest weight should come first. A query is truncated where any estimate says so. A blend never abstains
    and makes every expert eligible: where one router is unsure, the others decide. A single estimate is returned as it
    is.

    Args:
        weights: one for each estimate, with sum 1.
    """
    if len(estimates) == 1:
        return estimates[0]
    first = estimates[0]
    costs = [(e.cost_usd, w) for e, w in zip(estimates, weights, strict=True) if e.cost_usd is not None]
    truncated = [e.truncated for e in estimates if e.truncated is not None]
    return Estimate(
        experts=first.experts,
        quality=_mean([e.quality for e in estimates], weights),
        cost_usd=_mean([cost for cost, _ in costs], [weight for _, weight in costs]) if costs else None,
        ood=next((e.ood for e in estimates if e.ood is not None), None),
        labels=next((e.labels for e in estimates if e.labels is not None), None),
        truncated=np.any(truncated, axis=0) if truncated else None,
    )


def _mean(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    total = np.zeros(parts[0].shape)
    for part, share in zip(parts, shares, strict=True):
        total += share * part
    return total
