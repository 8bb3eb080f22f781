"""Strengths: the accuracy of an expert in each skill, estimated from counts, with intervals.

With a score s on n questions of a skill, and m the expert's mean over all its skills (itself shrunk towards 1/2 by two
questions, so that it is never 0 or 1), the accuracy in the skill is modelled as Beta(s + c m, n - s + c (1 - m)) with
shrinkage c: its mean is (s + c m) / (n + c). With few questions the estimate shrinks to the expert's overall mean, with
a wide interval. Symbolic-MoE (arXiv 2503.05641) uses s - (n - s) without shrinkage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from registry.profiles import Measure, Profiles

SHRINKAGE = 10.0
"""Weight of the expert's overall mean in every skill, in questions."""
COVERAGE = 0.95
"""Probability that an interval contains the accuracy."""


@dataclass(frozen=True, slots=True)
class Strength:
    """The accuracy of one expert in one skill.

    Attributes:
        n: number of questions. raw: mean score on them.
        accuracy: shrunken. low, high: bounds of the accuracy with 95% probability.
        others: mean of the other experts' shrunken accuracies; `None` if no other was measured in the skill.
        mean_tokens: generated tokens per question, or `None` if not recorded.
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
        """Accuracy minus the mean of the others."""
        return None if self.others is None else self.accuracy - self.others


def strengths(profiles: Profiles, expert: str, *, shrinkage: float = SHRINKAGE) -> list[Strength]:
    """The skills of an expert, strongest first; empty without measurements."""
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
    """Mean score of an expert over all its skills, shrunk towards 1/2 by two questions."""
    return (sum(measure.score for measure in measures) + 1.0) / (sum(measure.n for measure in measures) + 2.0)


def shrunken(measure: Measure, mean: float, shrinkage: float = SHRINKAGE) -> float:
    """Mean score, shrunk towards `mean` by `shrinkage` questions."""
    return (measure.score + shrinkage * mean) / (measure.n + shrinkage)


def interval(measure: Measure, mean: float, shrinkage: float = SHRINKAGE) -> tuple[float, float]:
    """The 95% interval of the accuracy in a skill; see the module."""
    from scipy.special import betaincinv

    right = max(measure.score, 0.0) + shrinkage * mean
    wrong = max(measure.n - measure.score, 0.0) + shrinkage * (1.0 - mean)
    tail = (1.0 - COVERAGE) / 2
    return float(betaincinv(right, wrong, tail)), float(betaincinv(right, wrong, 1.0 - tail))


def wilson(measure: Measure) -> tuple[float, float]:
    """Wilson's 95% interval of the accuracy, from the counts alone."""
    z, n, p = NormalDist().inv_cdf((1.0 + COVERAGE) / 2), measure.n, measure.accuracy
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(p * (1 - p), 0.0) / n + z * z / (4 * n * n))
    return 0.0 if p <= 0 else centre - half, 1.0 if p >= 1 else centre + half
