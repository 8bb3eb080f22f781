"""Metrics of routing: pure functions over (n_queries, n_experts) arrays.

Notation: y_qm is the score of expert m on query q, c_qm its cost, m(q) the expert that a router picks. A pick is an
(n,) array of expert indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Picks = NDArray[np.intp]
DRAWS = 2_000
"""Resamples of a bootstrap interval."""
_CELLS_PER_BATCH = 4_000_000  # bounds memory: 2,000 draws of 14,000 queries are 230 MB of indices


def picked(values: ArrayLike, picks: ArrayLike) -> Floats:
    """(n,) values[q, m(q)], of an (n, m) array of scores or costs."""
    array, index = np.asarray(values, dtype=np.float64), np.asarray(picks, dtype=np.intp)
    return np.asarray(array[np.arange(len(array)), index])


def best_single(mean_scores: ArrayLike) -> int:
    """argmax_m mean_q y_qm over *training* queries; B is the accuracy of that expert on the scored queries.

    Args:
        mean_scores: (m,) mean training score of each expert. Ties go to the first.
    """
    return int(np.asarray(mean_scores, dtype=np.float64).argmax())


def dataset_oracle(labels: Sequence[str], mean_scores: Mapping[str, Floats], fallback: int) -> Picks:
    """(n,) the expert with the best mean training score in each query's true label, which routers never see.

    Args:
        labels: n true labels.
        mean_scores: label -> (m,) mean training scores.
        fallback: the expert for labels without training queries.
    """
    best = {label: best_single(means) for label, means in mean_scores.items()}
    return np.array([best.get(label, fallback) for label in labels], dtype=np.intp)


def oracle(scores: ArrayLike, costs_usd: ArrayLike | None = None) -> Picks:
    """(n,) argmax_m y_qm, so that O = mean_q max_m y_qm; ties go to the cheapest if costs are known."""
    y = np.asarray(scores, dtype=np.float64)
    if costs_usd is None:
        return np.asarray(y.argmax(axis=1))
    best = y == y.max(axis=1, keepdims=True)
    return np.asarray(np.where(best, np.asarray(costs_usd, dtype=np.float64), np.inf).argmin(axis=1))


def gap_recovered(accuracy: float, best_single: float, oracle: float) -> float | None:
    """(A - B) / (O - B): 0 at the best single expert, 1 at the oracle. `None` if there is no gap."""
    return (accuracy - best_single) / (oracle - best_single) if oracle > best_single else None


def perf_gain(accuracy: float, best_single: float) -> float | None:
    """PerfGain = A / B - 1 (LLMRouterBench). `None` if B is 0."""
    return accuracy / best_single - 1.0 if best_single > 0 else None


def cost_save(mean_cost: float, best_single_cost: float) -> float | None:
    """CostSave = 1 - cost / cost of the best single expert (LLMRouterBench). `None` if that expert is free."""
    return 1.0 - mean_cost / best_single_cost if best_single_cost > 0 else None


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(ours - theirs), resampling queries with replacement; both keep the same queries.

    Args:
        ours, theirs: (n,) scores of two routings of the same queries.
        level: 0.95 gives the 2.5 and the 97.5 percentile.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if len(difference) < 2:
        return float(difference.mean()), float(difference.mean())
    low, high, _ = _bootstrap((difference,), lambda values, axis: values.mean(axis), draws, seed, level)
    return low, high


def bootstrap_saving(
    ours: ArrayLike, theirs: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of the saving 1 - mean(ours) / mean(theirs), resampling queries with replacement.

    Args:
        ours, theirs: (n,) costs of two routings of the same queries.

    Returns:
        `None` if theirs are free, in a resample too.
    """
    both = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if len(both[0]) < 2 or not both[1].any():
        saving = cost_save(both[0].mean(), both[1].mean())
        return None if saving is None else (float(saving), float(saving))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high, resampled = _bootstrap(
            both, lambda o, t, axis: 1.0 - o.mean(axis) / t.mean(axis), draws, seed, level
        )
    return (low, high) if np.isfinite(resampled).all() else None


def _bootstrap(
    samples: tuple[Floats, ...], statistic: Callable[..., Floats], draws: int, seed: int, level: float
) -> tuple[float, float, Floats]:
    """Bounds of the percentile interval, and the statistic of every resample; samples are resampled together."""
    from scipy.stats import bootstrap

    found = bootstrap(
        samples,
        statistic,
        n_resamples=draws,
        batch=max(1, _CELLS_PER_BATCH // len(samples[0])),
        vectorized=True,
        paired=len(samples) > 1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = found.confidence_interval
    return float(interval.low), float(interval.high), found.bootstrap_distribution


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 10) -> float:
    """ECE: mean |confidence - accuracy| over bins of equal mass, weighted by their numbers of queries.

    Equal confidences share a bin, so bins are of equal size only as far as confidences are distinct.

    Args:
        confidence, correct: (n,) predicted and actual score in [0, 1].
    """
    p, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    index = mass_bins(p, bins)
    counts = np.bincount(index, minlength=bins)
    gaps = np.abs(np.bincount(index, weights=p - y, minlength=bins))
    return float(gaps.sum() / counts.sum())


def mass_bins(values: ArrayLike, bins: int) -> Picks:
    """(n,) the bin 0 .. bins - 1 of each value; bins of equal mass, except that equal values share a bin."""
    numbers = np.asarray(values, dtype=np.float64)
    edges = np.quantile(numbers, np.linspace(0, 1, bins + 1)[1:-1])
    return np.asarray(np.searchsorted(edges, numbers, side="left"))


def expert_use(picks: ArrayLike, experts: Sequence[str]) -> dict[str, float]:
    """expert -> share of the queries it answers, largest first; experts that answer none are left out."""
    counts = np.bincount(np.asarray(picks, dtype=np.intp), minlength=len(experts))
    order = np.argsort(-counts, kind="stable")
    return {experts[m]: float(counts[m] / counts.sum()) for m in order if counts[m]}
