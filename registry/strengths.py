"""Strengths: what an expert's counts say of its skills, and how sure that is.

With s points on n questions of a skill, and m the expert's own mean over all its skills (itself drawn towards 1/2 by
two questions, so that it is never 0 or 1), the accuracy in the skill is taken to be Beta(s + c m, n - s + c (1 - m)), c
being the shrinkage: its mean is (s + c m) / (n + c). A skill of few questions is so told as hardly anything but the
expert's mean, with a wide interval. Symbolic-MoE (arXiv 2503.05641) takes s - (n - s) as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from registry.profiles import Measure, Profiles

SHRINKAGE = 10.0
"""How many questions' worth the expert's own mean counts in every skill."""
COVERAGE = 0.95
"""Probability that an interval holds the accuracy."""


@dataclass(frozen=True, slots=True)
class Strength:
    """One expert in one skill.

    Attributes:
        n: questions. raw: mean score on them.
        accuracy: shrunken. low, high: bounds of the accuracy with 95% probability.
        others: mean of the other experts' shrunken accuracies; `None` where no other was measured in the skill.
        mean_tokens: generated a question, where recorded.
    """

    skill: str
    n: int
    raw: float
    accuracy: float
    low: float
    high: float
    others: float | None
    mean_tokens: float | None

    @property
    def lead(self) -> float | None:
        """How much better than the others' mean."""
        return None if self.others is None else self.accuracy - self.others


def strengths(profiles: Profiles, expert: str, *, shrinkage: float = SHRINKAGE) -> list[Strength]:
    """The skills of an expert, strongest first; empty where nothing was measured of it."""
    means = {name: own_mean(list(profiles.of(name).values())) for name in profiles.experts}
    shrunk = {
        (name, skill): shrunken(measure, means[name], shrinkage) for (name, skill), measure in profiles.cells.items()
    }
    found = []
    for skill, measure in profiles.of(expert).items():
        low, high = interval(measure, means[expert], shrinkage)
        others = [shrunk[name, skill] for name in profiles.experts if name != expert and (name, skill) in shrunk]
        found.append(
            Strength(
                skill=skill,
                n=measure.n,
                raw=measure.accuracy,
                accuracy=shrunk[expert, skill],
                low=low,
                high=high,
                others=sum(others) / len(others) if others else None,
                mean_tokens=None if measure.completion_tokens is None else measure.completion_tokens / measure.n,
            )
        )
    return sorted(found, key=lambda strength: (-strength.accuracy, -strength.n, strength.skill))


def own_mean(measures: Sequence[Measure]) -> float:
    """An expert's mean score over all its skills, drawn towards 1/2 by two questions."""
    return (sum(measure.score for measure in measures) + 1.0) / (sum(measure.n for measure in measures) + 2.0)


def shrunken(measure: Measure, mean: float, shrinkage: float = SHRINKAGE) -> float:
    """Mean score, drawn towards `mean` by `shrinkage` questions."""
    return (measure.score + shrinkage * mean) / (measure.n + shrinkage)


def interval(measure: Measure, mean: float, shrinkage: float = SHRINKAGE) -> tuple[float, float]:
    """Where the accuracy in a skill lies with 95% probability; see the module."""
    from scipy.special import betaincinv

    right = max(measure.score, 0.0) + shrinkage * mean
    wrong = max(measure.n - measure.score, 0.0) + shrinkage * (1.0 - mean)
    tail = (1.0 - COVERAGE) / 2
    return float(betaincinv(right, wrong, tail)), float(betaincinv(right, wrong, 1.0 - tail))


def wilson(measure: Measure) -> tuple[float, float]:
    """Wilson's interval of the accuracy by the counts alone, at 95%."""
    z, n, p = NormalDist().inv_cdf((1.0 + COVERAGE) / 2), measure.n, measure.accuracy
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(p * (1 - p), 0.0) / n + z * z / (4 * n * n))
    return 0.0 if p <= 0 else centre - half, 1.0 if p >= 1 else centre + half
