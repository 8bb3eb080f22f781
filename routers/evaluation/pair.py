"""Metrics of a strong and a weak expert (RouteLLM, arXiv 2406.18665): the gap recovered by a share of strong calls.

A router's preference for the strong expert, one number per query, orders the queries; the share r of strong calls then
runs from 0 to 1. Queries of equal preference are in random order: their gain is spread evenly over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from routers.evaluation.metrics import Floats


@dataclass(frozen=True, slots=True)
class PairCurve:
    """PGR(r) = (A(r) - A_weak) / (A_strong - A_weak) at the shares of strong calls r = 0, 1/n, ..., 1.

    Attributes:
        shares, pgr: (n + 1,) each.
    """

    shares: Floats
    pgr: Floats

    @property
    def apgr(self) -> float:
        """The mean of PGR over shares from 0 to 1 (trapezoids): 0.5 for random calls."""
        return float(np.trapezoid(self.pgr, self.shares))

    def cpt(self, level: float) -> float:
        """CPT: the smallest share of strong calls with PGR >= level, interpolated between queries."""
        first = int(np.argmax(self.pgr >= level - 1e-12))  # PGR(1) = 1 reaches every level up to 1
        if first == 0:
            return float(self.shares[0])
        low, high = self.pgr[first - 1], self.pgr[first]
        part = (level - low) / (high - low)
        return float(self.shares[first - 1] + min(part, 1.0) * (self.shares[first] - self.shares[first - 1]))


def pair_curve(preference: ArrayLike, strong: ArrayLike, weak: ArrayLike) -> PairCurve | None:
    """The curve of a router between two experts.

    Args:
        preference: (n,) for the strong expert, e.g. its predicted quality minus that of the weak one.
        strong, weak: (n,) their scores.

    Returns:
        `None` if the strong expert is not better on these queries: there is no gap to recover.
    """
    order_of, inverse = np.unique(-np.asarray(preference, dtype=np.float64), return_inverse=True)
    difference = np.asarray(strong, dtype=np.float64) - np.asarray(weak, dtype=np.float64)
    total = difference.sum()
    if total <= 0:
        return None
    counts = np.bincount(inverse, minlength=len(order_of))
    evenly = np.bincount(inverse, weights=difference, minlength=len(order_of)) / counts
    gained = np.concatenate([[0.0], np.cumsum(np.repeat(evenly, counts))])
    return PairCurve(np.linspace(0.0, 1.0, len(gained)), gained / total)
