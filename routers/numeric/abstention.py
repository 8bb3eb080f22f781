"""When a router abstains: entropy and distance tests, and how their thresholds are tuned.

Composition of Experts (arXiv 2412.01868) sends uncertain and out-of-distribution prompts to a `general` category and
does not state how the limit is found. Ours: a query abstains where H(p) / log M > entropy threshold, or where its
cosine distance to the nearest training embedding > distance threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CANDIDATES = 16
"""Thresholds tried per test, besides infinity."""

_Floats = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Doubt:
    """Uncertainty of n queries and their distance to the training data.

    entropy: (n,) H(p) / log M in [0, 1]; distance: (n,) cosine distance to the nearest training embedding.
    """

    entropy: _Floats
    distance: _Floats

    def __len__(self) -> int:
        return len(self.entropy)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of the two tests; infinity disables a test."""

    entropy: float = np.inf
    distance: float = np.inf

    def exceeded(self, doubt: Doubt) -> NDArray[np.bool_]:
        """(n,) which queries abstain."""
        return np.asarray((doubt.entropy > self.entropy) | (doubt.distance > self.distance), dtype=bool)

    def explain(self, entropy: float, distance: float) -> str:
        """The tests that a query fails, with the numbers."""
        tests = (
            ("entropy of the categories", entropy, self.entropy),
            ("distance to the nearest training prompt", distance, self.distance),
        )
        return " and ".join(f"{name} {value:.3f} > {limit:.3f}" for name, value, limit in tests if value > limit)


def normalised_entropy(p: _Floats) -> _Floats:
    """(n,) H(p) / log M of (n, M) probabilities, in [0, 1]; 0 where there is a single category."""
    if p.shape[1] == 1:
        return np.zeros(len(p))
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    return np.asarray((-terms.sum(axis=1) / np.log(p.shape[1])).clip(0.0, 1.0))


def tune_thresholds(inside: Doubt, outside: Doubt, gain: _Floats, max_abstain: float) -> Thresholds:
    """The pair of thresholds that catches most out-of-distribution prompts without loss on in-distribution ones.

    Candidates are quantiles of the held-out in-distribution rows. A pair is admitted where at most a share
    `max_abstain` of these rows abstains and their mean score does not fall: sum of `gain` over the abstaining >= 0. The
    admitted pair that catches most of `outside` wins; among equals the one that fewer in-distribution rows exceed.
    Without `outside` the entropy test is disabled and the distance test alone is tuned, to the most rows it may stop.

    Args:
        inside: n in-distribution queries, each scored by a model that was not trained on it.
        outside: out-of-distribution prompts, or queries of categories that the model was not trained on; may be empty.
        gain: (n,) score of the generalist minus that of the routed expert on the in-distribution queries.
        max_abstain: share of the in-distribution queries in [0, 1].
    """
    best, best_key = Thresholds(), (0.0, 0.0)
    for candidate in _candidates(inside, max_abstain, with_entropy=len(outside) > 0):
        stopped = candidate.exceeded(inside)
        if stopped.mean() > max_abstain or gain[stopped].sum() < 0:
            continue
        caught = candidate.exceeded(outside).mean() if len(outside) else stopped.mean()
        key = (float(caught), -float(stopped.mean()))
        if key > best_key:
            best, best_key = candidate, key
    return best


def _candidates(inside: Doubt, max_abstain: float, *, with_entropy: bool) -> Iterator[Thresholds]:
    levels = 1.0 - np.linspace(0.0, max_abstain, CANDIDATES)
    distances = [np.inf, *np.quantile(inside.distance, levels)]
    entropies = [np.inf, *np.quantile(inside.entropy, levels)] if with_entropy else [np.inf]
    for entropy in entropies:
        for distance in distances:
            yield Thresholds(float(entropy), float(distance))
