"""Several routers' estimates of the same queries, joined by weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routers.base import Estimate, Floats


def blend(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted mean of qualities and costs, for the same queries and experts in the same order.

    Costs are averaged over the estimates that know them; `ood` and the labels are those of the first that has any, so
    the heaviest is best given first. A query counts as truncated where any of them did not read its end. A blend
    abstains from nothing and holds every expert eligible: what one router has doubts about is what the others are for.
    An estimate by itself is left as it is.

    Args:
        weights: one for each estimate, with sum 1.
    """
    if len(estimates) == 1:
        return estimates[0]
    first = estimates[0]
    costs = [(e.cost_usd, w) for e, w in zip(estimates, weights, strict=True) if e.cost_usd is not None]
    told = [e.truncated for e in estimates if e.truncated is not None]
    return Estimate(
        experts=first.experts,
        quality=_mean([e.quality for e in estimates], weights),
        cost_usd=_mean([cost for cost, _ in costs], [weight for _, weight in costs]) if costs else None,
        ood=next((e.ood for e in estimates if e.ood is not None), None),
        labels=next((e.labels for e in estimates if e.labels is not None), None),
        truncated=np.any(told, axis=0) if told else None,
    )


def _mean(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    total = np.zeros(parts[0].shape)
    for part, share in zip(parts, shares, strict=True):
        total += share * part
    return total
