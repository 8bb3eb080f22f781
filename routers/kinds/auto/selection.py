"""Select the best of several routers and estimate its gain: pure functions over held-out predictions.

Every candidate has predictions for each of the n queries from a fit that did not include the query (inner folds).
`choose` takes the candidate of the highest mean score, or a stack of all of them if that scores higher. Where its gain
over the best single expert is not significant, `choose` trusts none of these: on a small table the best of several is
mostly luck. It then takes a candidate that shrinks to the best single expert by itself, where there is one: on a small
table the test has too little power to tell a router that gains a point from one that gains none. The maximum over
candidates is biased upwards, so it is not reported: `expect` selects again without each fold in turn and scores that
selection on the fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routers.evaluation import metrics
from routers.kinds.quality.learners import Floats, centred
from routers.kinds.quality.stacking import stack_weights

LEAST_WEIGHT = 0.05
"""Members of a stack that weigh less are left out."""
SMALL_TABLE = 100
"""Rows an expert, below which held-out scores are too noisy to refuse a candidate that shrinks."""
BASELINE = 0
"""Index of the candidate that is the best single expert."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A candidate's predictions and scores on rows that it was not fitted on.

    quality: (n, m) expected scores; won: (n,) score of the expert that it chose for each row.
    """

    quality: Floats
    won: Floats


@dataclass(frozen=True, slots=True)
class Selection:
    """Chosen candidates by index, largest weight first, weights that sum to 1, and the reason in a sentence."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected score of the selected router on new queries, and its gain over the best single expert.

    Attributes:
        score, best_single: mean scores over rows that neither the candidates nor the selection had seen.
        gain_ci95_low, gain_ci95_high: paired bootstrap interval of the difference.
    """

    score: float
    best_single: float
    gain: float
    gain_ci95_low: float
    gain_ci95_high: float


def choose(
    trials: Sequence[Trial], y: Floats, folds: NDArray[np.intp], *, shrinking: Sequence[int] = (), seed: int = 0
) -> Selection:
    """The best candidate or stack by (n, m) scores; trial `BASELINE` must be that of the best single expert.

    For the comparison the stack's weights for a fold come from the other folds; for the final stack, from all rows. A
    selection has to beat the best single expert significantly: the 95% interval of its gain must lie above 0. Where
    none does and the table has fewer than `SMALL_TABLE` rows an expert, the best of the candidates `shrinking` is taken
    if its mean score is not more than a standard error below that of the best single expert.
    """
    means = [float(trial.won.mean()) for trial in trials]
    best = int(np.argmax(means))  # the first of equals, which is the cheaper
    chosen, won, what = Selection((best,), (1.0,), ""), trials[best].won, "best of the candidates"
    stacked = _stacked_scores(trials, y, folds) if len(trials) > 1 else won
    if stacked.mean() > won.mean():
        chosen, won, what = _stack(trials, y), stacked, "the stack beats each of its members"
    low, high = metrics.paired_bootstrap(won, trials[BASELINE].won, seed=seed)
    gain = won.mean() - trials[BASELINE].won.mean()
    shown = f"{100 * gain:+.2f} points over the best single expert, 95% interval [{100 * low:+.2f}, {100 * high:+.2f}]"
    if low <= 0.0:
        safe = _safe(trials, shrinking) if len(y) < SMALL_TABLE * y.shape[1] else BASELINE
        more = "" if safe == BASELINE else "; taken is one that shrinks to it"
        return Selection((safe,), (1.0,), f"no candidate surely beats the best single expert{more}: at best {shown}")
    return Selection(chosen.members, chosen.weights, f"{what}: {shown}")


def _safe(trials: Sequence[Trial], shrinking: Sequence[int]) -> int:
    """The candidate to take where none is surely better than the best single expert; of equals the later one."""
    if not shrinking:
        return BASELINE
    best = max(shrinking, key=lambda member: (float(trials[member].won.mean()), member))
    gains = trials[best].won - trials[BASELINE].won
    likely = gains.mean() > -gains.std() / len(gains) ** 0.5
    return best if gains.any() and likely else BASELINE


def expect(
    trials: Sequence[Trial], y: Floats, folds: NDArray[np.intp], *, shrinking: Sequence[int] = (), seed: int = 0
) -> Expected:
    """Expected score of `choose`: for each of three folds or more, select on the others and score on this one."""
    won = np.empty(len(y))
    for fold in np.unique(folds):
        inner, outer = folds != fold, folds == fold
        kept = [Trial(trial.quality[inner], trial.won[inner]) for trial in trials]
        choice = choose(kept, y[inner], folds[inner], shrinking=shrinking, seed=seed)
        won[outer] = _scores(choice, [Trial(t.quality[outer], t.won[outer]) for t in trials], y[outer])
    base = trials[BASELINE].won
    low, high = metrics.paired_bootstrap(won, base, seed=seed)
    return Expected(float(won.mean()), float(base.mean()), float(won.mean() - base.mean()), low, high)


def _stack(trials: Sequence[Trial], y: Floats) -> Selection:
    """The stack of all rows, without members of small weight."""
    weights = stack_weights(np.stack([centred(trial.quality) for trial in trials]), centred(y))
    kept = [i for i in np.argsort(-weights, kind="stable").tolist() if weights[i] >= LEAST_WEIGHT]
    shares = weights[kept] / weights[kept].sum()
    return Selection(tuple(kept), tuple(shares.tolist()), "")


def _stacked_scores(trials: Sequence[Trial], y: Floats, folds: NDArray[np.intp]) -> Floats:
    """(n,) scores of stacks whose weights come from the other folds."""
    won = np.empty(len(y))
    for fold in np.unique(folds):
        inner, outer = folds != fold, folds == fold
        choice = _stack([Trial(trial.quality[inner], trial.won[inner]) for trial in trials], y[inner])
        won[outer] = _scores(choice, [Trial(trial.quality[outer], trial.won[outer]) for trial in trials], y[outer])
    return won


def _scores(choice: Selection, trials: Sequence[Trial], y: Floats) -> Floats:
    """(n,) scores of a selection: a single candidate's own choices, or the expert of highest quality of a stack."""
    if len(choice.members) == 1:
        return trials[choice.members[0]].won
    parts = [w * trials[i].quality for i, w in zip(choice.members, choice.weights, strict=True)]
    return metrics.picked(y, np.sum(parts, axis=0).argmax(axis=1))
