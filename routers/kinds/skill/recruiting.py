"""Recruiting by skills, as in Symbolic-MoE (arXiv 2503.05641): pure functions, and the explanation of one query.

Notation: N training queries, n queries, m experts, K skills; y is a score in [0, 1]. A query's skills are a row of K
numbers >= 0: counts of each skill, or shares of the query (then they sum to 1).

The formulas are those of the paper's code, checked by hand in the tests; differences are stated at each function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Found = Literal["exact", "alias", "nearest", "read"]
WithoutSkills = Literal["competency", "uniform"]
SHOWN = 3
"""Skills that a reason names."""
RESERVE = 1e-6
"""Largest total weight of unsuitable experts where some are suitable."""


@dataclass(frozen=True, slots=True)
class QuerySkill:
    """One skill of a query.

    Attributes:
        name: of the vocabulary.
        share: of the query, in (0, 1]; those of a query sum to 1.
        found: `exact`: the word is the skill's name; `alias`: the name of a synonym that was merged into it; `nearest`:
            a word that is not in the vocabulary, whose nearest skill this is; `read`: no word, the query's text is
            near to training queries of this skill.
        word: the word that was looked up; `None` where the text was read.
        cosine: of the word and the skill (1 for an alias); `None` where the text was read.
    """

    name: str
    share: float
    found: Found
    word: str | None = None
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """One expert's figures for a query.

    Attributes:
        profile: its profile in each skill of `Explanation.skills`, in that order.
        suitability: S_i, the local one; 0 where the query has no known skill.
        competency: gamma_i, the global one; those of all experts sum to 1.
        weight: recruiting weight; those of all experts sum to 1. 0: recruited only where no other expert can be.
        quality: expected score in [0, 1].
        trimmed: it is never recruited, because too few training queries recruit it.
    """

    expert: str
    profile: tuple[float, ...]
    suitability: float
    competency: float
    weight: float
    quality: float
    trimmed: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """The recruiting explanation of one query, as `SkillRouter.explain(query)` returns it.

    Attributes:
        skills: largest share first; empty where none is known.
        unknown: words that are far from every skill.
        experts: all of them, largest weight first (ties: the higher quality, then the order in training).
        reason: the same in a short sentence, as in the decision.
    """

    skills: tuple[QuerySkill, ...]
    unknown: tuple[str, ...]
    experts: tuple[Standing, ...]
    reason: str


def profiles(scores: Floats, skills: Floats) -> Floats:
    """(K, m) profiles: for each skill of each training query, +1 where the expert was right and -1 where it was wrong.

    Args:
        scores: (N, m); a score between 0 and 1 counts 2 y - 1; the paper has only right or wrong answers.
        skills: (N, K).
    """
    return np.asarray(skills.T @ (2.0 * scores - 1.0))


def suitability(skills: Floats, profile: Floats) -> Floats:
    """(n, m) local suitability S_i: the sum of expert i's profile over the skills of the query.

    With counts in `skills` this is the paper's sum; with shares its mean.
    """
    return np.asarray(skills @ profile)


def competency(profile: Floats, temperature: float) -> Floats:
    """(m,) global competency gamma_i, which sums to 1: proportional to x_i^(1/T), x_i the sum of expert i's profile.

    Where any of the sums is negative all are shifted by -min + 1. The paper's T is 0.5. Where all sums are 0 all
    experts are equally competent (the paper divides by zero).
    """
    totals = profile.sum(axis=0)
    x = totals - totals.min() + 1.0 if (totals < 0).any() else totals
    if not x.any():
        return np.full(len(x), 1.0 / len(x))
    scaled = (x / x.max()) ** (1.0 / temperature)  # relative: powers of large sums overflow
    return np.asarray(scaled / scaled.sum())


def recruiting_weights(
    local: Floats, gamma: Floats, kept: NDArray[np.bool_] | None = None, *, reserve: bool = False
) -> Floats:
    """(n, m) weights S_i gamma_i, each row summing to 1, of the experts with S_i > 0.

    Where no expert has S_i > 0, all have weights, from S_i shifted by -min + 1. Experts that are not kept have weight 0
    and do not affect the others. Where all weights are 0 because the competencies are, S_i alone is used.

    Args:
        local: (n, m) suitabilities. gamma: (m,) competencies. kept: (m,) bool, at least one True; `None`: all.
        reserve: experts with S_i <= 0 get shifted weights that sum to a millionth, or to less than the least weight of
            a suitable expert, so that the k of largest weight are k experts where fewer are suitable. The paper, which
            draws with replacement, has no reserve.
    """
    among = np.ones(len(gamma), dtype=bool) if kept is None else kept
    suitable = among & (local > 0)
    some = suitable.any(axis=1, keepdims=True)
    lowest = np.where(among, local, np.inf).min(axis=1, keepdims=True)
    shifted = _rows_to_one(np.where(among & ~suitable, local - lowest + 1.0, 0.0), gamma)
    weights = np.where(some, _rows_to_one(np.where(suitable, local, 0.0), gamma), shifted)
    if not reserve:
        return weights
    least = np.where(weights > 0, weights, 1.0).min(axis=1, keepdims=True)
    return share_of(np.where(some, weights + np.minimum(RESERVE, least / 2) * shifted, weights))


def _rows_to_one(s: Floats, gamma: Floats) -> Floats:
    """(n, m) s gamma, or s in rows where that is 0, each row divided by its sum; rows of zeros stay."""
    weights = s * gamma
    return share_of(np.where(weights.any(axis=1, keepdims=True), weights, s))


def without_skills(gamma: Floats, kept: NDArray[np.bool_], how: WithoutSkills) -> Floats:
    """(m,) weights for a query without a known skill: the competencies, or `uniform`, as in the paper."""
    weights = np.where(kept, gamma if how == "competency" else 1.0, 0.0)
    weights = weights if weights.any() else kept.astype(np.float64)
    return np.asarray(weights / weights.sum())


def kept_after_trimming(weights: Floats, k: int, least_share: float) -> NDArray[np.bool_]:
    """(m,) bool: the experts that are recruited for at least a share of the training queries.

    Recruited are the experts of a query's k largest weights; equal ones share the last place. At least k experts are
    kept, the most recruited. The paper trims by the queries of the test set, so that a decision depends on which
    queries are routed with it; here the training queries decide, once, in training.

    Args:
        weights: (N, m) of the training queries.
    """
    n, m = weights.shape
    if m <= k:
        return np.ones(m, dtype=bool)
    last = np.sort(weights, axis=1)[:, m - k]
    share = ((weights > 0) & (weights >= last[:, None])).sum(axis=0) / max(1, n)
    kth = np.sort(share)[m - k]
    return np.asarray((share >= least_share) | (share >= kth), dtype=bool)


def stated(skills: Sequence[tuple[str, float]], first: str, why: str, unknown: Sequence[str] = ()) -> str:
    """A sentence with the skills, their shares, and why the first expert was recruited.

    Args:
        skills: names and shares, largest first; why: predicate of the first expert; unknown: words without a skill.
    """
    if not skills:
        words = f"none of {', '.join(map(repr, unknown))} is a known skill" if unknown else "no skill is known"
        return f"{words}: {first} {why}"
    named = ", ".join(f"{name} {share:.0%}" for name, share in skills[:SHOWN])
    more = f" and {len(skills) - SHOWN} more" if len(skills) > SHOWN else ""
    return f"needs {named}{more}: {first} {why}"


def share_of(counts: NDArray[Any]) -> Floats:
    """(n, K) rows of counts as shares that sum to 1; rows of zeros stay."""
    total = counts.sum(axis=1, keepdims=True)
    return np.asarray(counts / np.where(total > 0, total, 1.0), dtype=np.float64)
