"""Selectors: how many candidates are asked, in which order. Any selector works on any Estimate.

    top-k     the k experts of highest utility; `best` is top-1
    recruit   the k experts of largest weight (`Estimate.weights`), or k draws by weight
    dynamic   experts until one of them is right with probability p
    cascade   the cheapest expert that is good enough first, then better and more expensive ones

To add one: a frozen dataclass with `kind`, `k` and `choose`, and its line in `SELECTORS`. A selector is data, so that a
decision log can store it; its threshold is solved on training rows (`routers.evaluation.thresholds`), not on test rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from registry.spelling import did_you_mean
from routers.base import Estimate, Floats
from routers.errors import InvalidSettings, RouterError
from routers.ranking import TIE_DECIMALS, Columns


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The experts that may be asked, for n queries and m experts.

    Attributes:
        utilities: (n, m) float64.
        order: (n, m) columns, best utility first (ties settled); experts that may not be asked come last.
        counts: (n,) how many columns of each row of `order` may be asked; at least 1.
        weights: (n, m) weight of each expert, 0 for experts that may not be asked.
        rng: for selectors that draw; `None` means a generator of the selector's own seed.
    """

    estimate: Estimate
    utilities: Floats
    order: Columns
    counts: Columns
    weights: Floats
    rng: np.random.Generator | None = None


class Selector(Protocol):
    """Picks the experts to ask among the candidates. A frozen value: selectors of equal settings are equal."""

    kind: ClassVar[str]

    @property
    def draws(self) -> bool:
        """Whether the choice is random."""
        ...

    @property
    def k(self) -> int:
        """The most experts of a decision."""
        ...

    def choose(self, candidates: Candidates) -> list[Columns]:
        """n arrays of 1 to k columns, in the order in which the experts are asked. Pure."""
        ...


@dataclass(frozen=True, slots=True)
class TopK:
    """The k experts of highest utility, best first; fewer if there are fewer candidates.

    k: the most experts.
    """

    kind: ClassVar[str] = "top-k"
    draws: ClassVar[bool] = False
    k: int = 1

    def __post_init__(self) -> None:
        _check_k(self.k)

    def choose(self, candidates: Candidates) -> list[Columns]:
        """See `Selector.choose`."""
        return _first(candidates, np.minimum(candidates.counts, self.k))


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Experts in order of utility until the probability that one of them is right reaches p, at most k.

    With estimated qualities q_1, q_2, ... in that order and independent errors, one of the first j answers is right
    with probability 1 - prod_(i<=j) (1 - q_i). Adapted from dynamic routing inside mixture-of-experts models (arXiv
    2403.07652), which adds experts until their cumulative gate probability exceeds p. Here the unit is a query, and
    several experts may be right, so complements multiply instead of probabilities adding up. Experts err on the same
    queries, so the probability is optimistic: choose p by its cost in calls (`dynamic_for_calls`).

    p: probability in (0, 1] at which to stop.
    k: the most experts.
    """

    kind: ClassVar[str] = "dynamic"
    draws: ClassVar[bool] = False
    p: float = 0.9
    k: int = 5

    def __post_init__(self) -> None:
        _check_k(self.k)
        _check_number("p", self.p, 0.0, 1.0)

    def choose(self, candidates: Candidates) -> list[Columns]:
        """See `Selector.choose`."""
        reached = one_is_right(candidates, self.k)
        enough = 1 + (reached[:, :-1] < self.p).sum(axis=1)
        return _first(candidates, np.minimum(candidates.counts, enough))


@dataclass(frozen=True, slots=True)
class Cascade:
    """The cheapest expert that is predicted to be good enough; then better and more expensive ones.

    Good enough: estimated quality of at least `threshold`, and utility at most `tolerance` below the best; if no expert
    is, the best one is asked. With k > 1 follow experts that each cost more and have a higher utility than the one
    before, cheapest first; if these are more than k, the last one is still the best. Equal costs go to the higher
    utility. Adapted from FrugalGPT (arXiv 2305.05176), which learns when a cheap answer suffices; this selector decides
    before any expert is asked. The composition `cascade` decides by the answers.

    tolerance: how far below the best utility is still good enough.
    threshold: least estimated quality that is good enough.
    k: the most experts.

    Raises:
        RouterError: from `choose`, if costs are unknown.
    """

    kind: ClassVar[str] = "cascade"
    draws: ClassVar[bool] = False
    tolerance: float = math.inf
    threshold: float = 0.0
    k: int = 1

    def __post_init__(self) -> None:
        _check_k(self.k)
        _check_number("tolerance", self.tolerance, 0.0, math.inf)
        _check_number("threshold", self.threshold, 0.0, 1.0)
        if math.isinf(self.tolerance) and self.threshold == 0:
            raise InvalidSettings(
                "a cascade selector needs `tolerance` (utility below the best) or `threshold` (least quality): without "
                "one, the cheapest expert would answer every query"
            )

    def choose(self, candidates: Candidates) -> list[Columns]:
        """See `Selector.choose`."""
        costs = known_costs(candidates.estimate, "a cascade asks cheap experts first", "use another selector")
        utilities = np.round(candidates.utilities, TIE_DECIMALS)
        return [self._path(candidates, i, costs[i], utilities[i]) for i in range(len(candidates.order))]

    def _path(self, candidates: Candidates, i: int, costs: Floats, utilities: Floats) -> Columns:
        ranked = candidates.order[i, : candidates.counts[i]]
        quality, best = np.asarray(candidates.estimate.quality[i], dtype=np.float64), ranked[0]  # as in a log
        # Stable: equal costs keep the order of `ranked`.
        cheap_first = ranked[np.argsort(costs[ranked], kind="stable")]
        suffices = (quality[cheap_first] >= self.threshold) & (
            utilities[cheap_first] >= round(float(utilities[best]) - self.tolerance, TIE_DECIMALS)
        )
        start = cheap_first[suffices.argmax()] if suffices.any() else best
        path = [start]
        for column in cheap_first:
            if costs[column] > costs[path[-1]] and utilities[column] > utilities[path[-1]]:
                path.append(column)
        shortened = path if len(path) <= self.k else [*path[: self.k - 1], path[-1]] if self.k > 1 else path[:1]
        return np.array(shortened, dtype=np.intp)


@dataclass(frozen=True, slots=True)
class Recruit:
    """The k experts of largest weight, or k draws by weight (Symbolic-MoE, arXiv 2503.05641).

    The weight of an expert is `Estimate.weights` times utility / quality (at least 0): the share of its quality that
    price and load time leave. The paper draws k times with replacement, so an expert may be recruited twice; the
    default here is deterministic: the k of largest weight, ties by utility. Experts of weight 0 are asked only if all
    weights are 0.

    k: number of experts, or of draws.
    draw: "top", or "replacement" as in the paper.
    seed: of the draws for queries without a seed.
    """

    kind: ClassVar[str] = "recruit"
    k: int = 3
    draw: Literal["top", "replacement"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_k(self.k)
        if self.draw not in ("top", "replacement"):
            raise InvalidSettings(f"draw must be 'top' or 'replacement', got {self.draw!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise InvalidSettings(f"seed must be a whole number >= 0, got {self.seed!r}")

    @property
    def draws(self) -> bool:
        """See `Selector.draws`."""
        return self.draw != "top"

    def choose(self, candidates: Candidates) -> list[Columns]:
        """See `Selector.choose`. Largest weight first; an expert that is drawn twice is listed twice."""
        given = candidates.rng
        rng = np.random.default_rng(self.seed) if given is None else given
        return [self._row(candidates, i, rng) for i in range(len(candidates.order))]

    def _row(self, candidates: Candidates, i: int, rng: np.random.Generator) -> Columns:
        ranked = candidates.order[i, : candidates.counts[i]]
        weights = np.round(candidates.weights[i, ranked], TIE_DECIMALS)
        if not weights.any():
            return ranked[: self.k]
        heaviest = np.argsort(-weights, kind="stable")  # equal weights stay in order of utility
        if self.draw == "top":
            return np.asarray(ranked[heaviest[weights[heaviest] > 0][: self.k]], dtype=np.intp)
        shares = weights[heaviest] / weights.sum()
        drawn = np.sort(rng.choice(len(ranked), size=self.k, p=shares))
        return np.asarray(ranked[heaviest[drawn]], dtype=np.intp)


SELECTORS: dict[str, type[TopK] | type[Dynamic] | type[Cascade] | type[Recruit]] = {
    selector.kind: selector for selector in (TopK, Dynamic, Cascade, Recruit)
}
"""kind -> class. `best` is another name for top-k with k = 1."""
BEST = "best"


def build_selector(document: str | Mapping[str, Any], **defaults: Any) -> Selector:
    """A selector from its name, or from a mapping of `kind` and settings: `{kind: dynamic, p: 0.9, k: 5}`.

    Args:
        defaults: settings used if the mapping leaves them out.

    Raises:
        InvalidSettings: an unknown kind, or an unknown or unusable setting.
    """
    given = {"kind": document} if isinstance(document, str) else dict(document)
    kind = given.pop("kind", None)
    if kind not in (BEST, *SELECTORS):
        raise InvalidSettings(f"no selector {kind!r}{did_you_mean(str(kind), (BEST, *SELECTORS), listed=True)}")
    settings = {**defaults, **given}
    if kind == BEST:
        if settings.get("k", 1) != 1:
            raise InvalidSettings(f"selector 'best' asks one expert, not k={settings['k']}: use 'top-k'")
        kind, settings = TopK.kind, {**settings, "k": 1}
    known = list(inspect.signature(SELECTORS[kind]).parameters)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise InvalidSettings(f"selector {kind!r} has no setting {', '.join(unknown)}; it has: {', '.join(known)}")
    return SELECTORS[kind](**settings)


def selector_document(selector: Selector) -> dict[str, Any]:
    """A selector as JSON values, from which `build_selector` rebuilds an equal one. Infinite settings are left out."""
    settings = asdict(selector)  # type: ignore[call-overload]  # every selector is a dataclass
    return {"kind": selector.kind, **{name: value for name, value in settings.items() if value != math.inf}}


def one_is_right(candidates: Candidates, k: int) -> Floats:
    """(n, min(k, m)) probability that one of the first j + 1 candidates is right, if errors are independent."""
    columns = candidates.order[:, :k]
    quality = np.take_along_axis(np.asarray(candidates.estimate.quality, dtype=np.float64), columns, axis=1)
    wrong = np.where(np.arange(columns.shape[1]) < candidates.counts[:, None], 1.0 - quality.clip(0.0, 1.0), 1.0)
    return np.asarray(1.0 - np.cumprod(wrong, axis=1))


def known_costs(estimate: Estimate, purpose: str, instead: str) -> Floats:
    """(n, m) costs in USD, all of them known.

    Args:
        purpose: why costs are needed; instead: what to do without them. Both are part of the message.

    Raises:
        RouterError: some costs are unknown.
    """
    if estimate.cost_usd is None:
        raise RouterError(
            f"{purpose}, but this router knows no costs: train it on a table with cost columns (or with prices), or "
            f"{instead}"
        )
    known = np.isfinite(estimate.cost_usd)
    if not known.all():
        names = ", ".join(name for j, name in enumerate(estimate.experts) if not known[:, j].all())
        raise RouterError(f"{purpose}, but the cost of {names} is unknown: {instead}")
    return np.asarray(estimate.cost_usd, dtype=np.float64)


def _first(candidates: Candidates, counts: Columns) -> list[Columns]:
    return [row[:count] for row, count in zip(candidates.order, counts, strict=True)]


def _check_k(k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidSettings(f"k must be a whole number >= 1, got {k!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidSettings(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
