"""Skill profiles as plain arrays: estimates, explanations, and their saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import GENERAL, Estimate
from routers.kinds.skill.reading import Reading
from routers.kinds.skill.recruiting import (
    Explanation,
    Floats,
    QuerySkill,
    Standing,
    WithoutSkills,
    competency,
    kept_after_trimming,
    profiles,
    recruiting_weights,
    share_of,
    stated,
    suitability,
    without_skills,
)
from routers.kinds.skill.vocabulary import NONE, Match
from routers.numeric.shrinkage import shrunk_means
from routers.ranking import TIE_DECIMALS

_ARRAYS = ("profile", "gamma", "kept", "accuracy", "mean_scores", "costs", "mean_costs")


@dataclass(frozen=True, slots=True, eq=False)
class SkillModel:
    """K skills, m experts.

    Attributes:
        profile: (K, m) right minus wrong answers of each expert in each skill.
        gamma: (m,) global competencies, which sum to 1.
        kept: (m,) bool: the experts that are not trimmed.
        accuracy, costs: (K, m) mean score and USD of each expert in each skill, shrunk to the mean over all
            queries, which is mean_scores, mean_costs (m,). Costs are `None` where unknown.
    """

    experts: tuple[str, ...]
    skills: tuple[str, ...]
    profile: Floats
    gamma: Floats
    kept: NDArray[np.bool_]
    accuracy: Floats
    mean_scores: Floats
    costs: Floats | None
    mean_costs: Floats | None
    without_skills: WithoutSkills
    reserve: bool

    @classmethod
    def learned(
        cls,
        experts: tuple[str, ...],
        skills: tuple[str, ...],
        scores: Floats,
        costs: Floats | None,
        members: Floats,
        *,
        temperature: float,
        shrinkage: float,
        unknown: WithoutSkills,
        reserve: bool,
    ) -> Self:
        """From (N, m) scores and costs of training queries with (N, K) skills, 0 or 1; no expert is trimmed."""
        shares, profile = share_of(members), profiles(scores, members)
        return cls(
            experts=experts,
            skills=skills,
            profile=profile,
            gamma=competency(profile, temperature),
            kept=np.ones(len(experts), dtype=bool),
            accuracy=shrunk_means(scores, shares, shrinkage),
            mean_scores=scores.mean(axis=0),
            costs=None if costs is None else shrunk_means(costs, shares, shrinkage),
            mean_costs=None if costs is None else costs.mean(axis=0),
            without_skills=unknown,
            reserve=reserve,
        )

    def trimmed(self, skills: Floats, k: int, least_share: float) -> NDArray[np.bool_]:
        """(m,) bool: the experts that are recruited for enough of the (N, K) training queries, k per query."""
        weights = recruiting_weights(suitability(skills, self.profile), self.gamma, reserve=self.reserve)
        return kept_after_trimming(weights, k, least_share)

    def estimate(self, reading: Reading) -> Estimate:
        """The estimate for n queries; see `SkillRouter`."""
        shares, known = reading.shares, reading.known
        local = suitability(reading.skills, self.profile)
        unread = without_skills(self.gamma, self.kept, self.without_skills)
        weights = np.where(
            known[:, None], recruiting_weights(local, self.gamma, self.kept, reserve=self.reserve), unread
        )
        quality = _expected(shares, known, self.accuracy, self.mean_scores).clip(0.0, 1.0)
        first = _best_first(weights, quality)[:, 0]
        cost_usd = None
        if self.costs is not None and self.mean_costs is not None:
            cost_usd = _expected(shares, known, self.costs, self.mean_costs)
        return Estimate(
            experts=self.experts,
            quality=quality,
            cost_usd=cost_usd,
            ood=reading.ood,
            labels=tuple(self.skills[k] if ok else GENERAL for k, ok in zip(shares.argmax(axis=1), known, strict=True)),
            reasons=tuple(
                self._reason(shares[i], local[i], int(first[i]), reading.words(i)) for i in range(len(local))
            ),
            weights=weights,
        )

    def explain(self, reading: Reading) -> Explanation:
        """The recruiting explanation of the first query of a reading."""
        estimate, shares, matches = self.estimate(reading), reading.shares[0], reading.words(0)
        known, local = _by_share(shares), suitability(reading.skills, self.profile)[0]
        weights = np.zeros(0) if estimate.weights is None else estimate.weights[0]
        standings = [
            Standing(
                expert=self.experts[m],
                profile=tuple(self.profile[known, m].tolist()),
                suitability=float(local[m]),
                competency=float(self.gamma[m]),
                weight=float(weights[m]),
                quality=float(estimate.quality[0, m]),
                trimmed=not self.kept[m],
            )
            for m in _best_first(weights[None], estimate.quality)[0]
        ]
        return Explanation(
            skills=tuple(_query_skill(self.skills[k], float(shares[k]), k, matches) for k in known),
            unknown=_unknown(matches),
            experts=tuple(standings),
            reason="" if estimate.reasons is None else estimate.reasons[0],
        )

    def _reason(self, shares: Floats, local: Floats, first: int, matches: Sequence[Match] | None) -> str:
        needed = [(self.skills[k], float(shares[k])) for k in _by_share(shares)]
        if not needed:
            why = f"has the highest competency, {self.gamma[first]:.2f}"
            if self.without_skills == "uniform":
                why = "is one of equally weighted experts"
        elif local[first] > 0:
            why = f"has the most weight, suitability {local[first]:.1f} x competency {self.gamma[first]:.2f}"
        else:
            why = f"has the most weight, though it is not right more often than wrong on them ({local[first]:.1f})"
        return stated(needed, self.experts[first], why, _unknown(matches))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        kept = {name: getattr(self, name) for name in _ARRAYS}
        return {name: array for name, array in kept.items() if array is not None}

    @classmethod
    def restored(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        experts: Sequence[str],
        skills: tuple[str, ...],
        *,
        unknown: WithoutSkills,
        reserve: bool,
    ) -> Self:
        """The model of `arrays()`; its estimates are identical to the bit."""
        found: dict[str, Any] = {n: arrays.get(n) if n.endswith("costs") else arrays[n] for n in _ARRAYS}
        return cls(tuple(experts), skills, without_skills=unknown, reserve=reserve, **found)


def _expected(shares: Floats, known: NDArray[np.bool_], by_skill: Floats, overall: Floats) -> Floats:
    """(n, m) mean over a query's skills, or the overall mean where none is known."""
    return np.where(known[:, None], shares @ by_skill, overall)


def _best_first(weights: Any, quality: Any) -> NDArray[np.intp]:
    """(n, m) columns, largest weight first; ties by quality, then by column."""
    return np.asarray(np.lexsort((-np.round(quality, TIE_DECIMALS), -np.round(weights, TIE_DECIMALS)), axis=-1))


def _by_share(shares: Floats) -> list[int]:
    """The skills that a query needs, largest share first."""
    return [int(k) for k in np.argsort(-shares, kind="stable") if shares[k] > 0]


def _query_skill(name: str, share: float, k: int, matches: Sequence[Match] | None) -> QuerySkill:
    """With the first word that stands for it."""
    if matches is None:
        return QuerySkill(name, share, "read")
    match = next(match for match in matches if match.skill == k)
    return QuerySkill(name, share, match.found, match.word, match.cosine)


def _unknown(matches: Sequence[Match] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(match.word for match in matches or () if match.skill == NONE))
