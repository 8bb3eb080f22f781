"""decide: turns an Estimate into decisions. Pure, and the only place where experts are chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from registry.spelling import listing
from routers.base import Estimate, Floats, RoutingDecision
from routers.errors import NoEligibleExpert, RouterError
from routers.ranking import TIE_DECIMALS as TIE_DECIMALS
from routers.ranking import Ranking
from routers.selectors import Candidates, Selector, TopK, known_costs

WEIGHT_TEMPERATURE = 0.1
"""A difference of 0.1 in utility is a factor e in the weights of a composition."""


@dataclass(frozen=True, slots=True)
class Utility:
    """utility = quality - cost_weight * cost_usd - latency_weight * load_s - the price of a switch.

    cost_weight: quality (score in [0, 1]) given up per USD; latency_weight: quality given up per second of load time;
    switch_weight: quality given up per second of prefill that a `Switch` costs, 0 makes switches free.

    Raises:
        RouterError: a weight is negative or not finite.
    """

    cost_weight: float = 0.0
    latency_weight: float = 0.0
    switch_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cost_weight", "latency_weight", "switch_weight"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise RouterError(f"{name} must be a finite number >= 0, got {value}")


@dataclass(frozen=True, slots=True)
class Switch:
    """What it costs to move a conversation to another expert, which must prefill it again.

    Attributes:
        previous: the expert of the previous turns; it alone costs nothing.
        tokens: of the conversation that the previous expert has in its cache, and another one must prefill.
        cost_usd: expert -> USD of these tokens; none is 0. seconds: expert -> seconds of prefill.

    Raises:
        RouterError: a cost or a time is negative or not finite.
    """

    previous: str
    tokens: int
    cost_usd: Mapping[str, float]
    seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in ("cost_usd", "seconds"):
            bad = {key: value for key, value in getattr(self, name).items() if not np.isfinite(value) or value < 0}
            if bad:
                raise RouterError(f"{name} of a switch must be finite numbers >= 0, got {bad}")

    def price(self, expert: str, utility: Utility) -> float:
        """The utility that `expert` loses: switch_weight * seconds + cost_weight * cost_usd; 0 if switches are free."""
        if expert == self.previous or not utility.switch_weight:
            return 0.0
        seconds, usd = self.seconds.get(expert, 0.0), self.cost_usd.get(expert, 0.0)
        return utility.switch_weight * seconds + utility.cost_weight * usd


def decide(
    estimate: Estimate,
    *,
    utility: Utility | Sequence[Utility] = Utility(),
    load_s: Mapping[str, float] | None = None,
    switch: Sequence[Switch | None] | None = None,
    allowed: Collection[str] | Sequence[Collection[str] | None] | None = None,
    select: Selector | None = None,
    k: int | None = None,
    rng: np.random.Generator | None = None,
) -> list[RoutingDecision]:
    """Choose the experts that answer each of n queries.

    utility = quality - cost_weight * cost_usd - latency_weight * load_s - `Switch.price`. The candidates are the
    experts that are both allowed and eligible; if no expert is both, the best allowed expert answers and `reason` says
    so. A query on which the router abstains without any eligible expert is refused: its decision has no experts. Equal
    utilities (to 12 decimals) go to the cheaper expert, then to the one listed first; with `rng`, to chance.

    Args:
        estimate: predictions of a router for n queries and m experts.
        utility: cost and latency weights, one for all queries or one per query.
        load_s: expert -> seconds until it can start; experts that are not listed are ready.
        switch: the price of moving the conversation of each query to another expert; `None` where there is none.
        allowed: names that may answer, one collection for all queries, or one (`None`: no limit) per query. Names that
            the estimate does not have are ignored as long as one known name remains.
        select: how many candidates are called, in which order; `None` means the best one.
        k: short for `select=TopK(k)`; fewer experts if there are fewer candidates.
        rng: breaks ties at random, and is the source of chance of selectors that draw.

    Returns:
        n decisions. Weights are `Estimate.weights` of the chosen experts if the router gives them, else
        softmax(utility / 0.1): a difference of 0.1 in utility is a factor e, and common offsets cancel out. Confidence
        is `Estimate.confidence` if the best candidate comes first and no constraint overruled the router; else, or if
        the estimate has no confidence, it is the estimated quality of the first expert.

    Raises:
        NoEligibleExpert: a query has no allowed expert of known quality; the message names the constraint.
        RouterError: a cost weight > 0 or a cascade without known costs, or an argument of a wrong length or value.
    """
    if select is not None and k is not None:
        raise RouterError("give either select or k: `k` is short for `select=TopK(k)`")
    select = TopK(1 if k is None else k) if select is None else select
    utilities = utilities_of(estimate, utility, load_s or {}, switch)
    permitted = _permitted(estimate, allowed)
    ranking = Ranking.of(permitted, estimate.eligible, estimate.cost_usd, rng)
    order = ranking.order(utilities)
    weights = np.where(ranking.candidates, _weights(estimate, utilities), 0.0)
    chosen = select.choose(Candidates(estimate, utilities, order, ranking.candidates.sum(axis=1), weights, rng))
    overruled = ranking.overruled
    unchanged = [not over and columns[0] == row[0] for over, columns, row in zip(overruled, chosen, order, strict=True)]
    refused = _refused(estimate)
    return [
        _refusal(estimate, i)
        if refused[i]
        else _decision(estimate, i, columns, utilities[i], weights[i], bool(overruled[i]), bool(unchanged[i]))
        for i, columns in enumerate(chosen)
    ]


def first_choices(
    estimate: Estimate,
    *,
    utility: Sequence[Utility],
    allowed: Sequence[Collection[str]],
    switch: Sequence[Switch | None],
) -> list[str | None]:
    """The expert of highest utility for each of n queries: the first of `decide` with TopK, without its bookkeeping.

    `None` where no allowed expert has a known quality, or the router refuses.

    Raises:
        RouterError: as `decide`, for costs.
    """
    utilities = utilities_of(estimate, utility, {}, switch)
    names = np.array([[name in among for name in estimate.experts] for among in allowed], dtype=bool)
    permitted = names.reshape(estimate.quality.shape) & ~np.isnan(estimate.quality)
    first = Ranking.of(permitted, estimate.eligible, estimate.cost_usd).first(utilities)
    some = _any_of_each_row(permitted) & ~_refused(estimate)
    return [estimate.experts[column] if ok else None for column, ok in zip(first, some, strict=True)]


def utilities_of(
    estimate: Estimate,
    utility: Utility | Sequence[Utility],
    load_s: Mapping[str, float],
    switch: Sequence[Switch | None] | None,
) -> Floats:
    """(n, m) utilities, by which `decide` ranks; NaN if the quality is NaN.

    Raises:
        RouterError: as `decide`, for costs and arguments of a wrong length or value.
    """
    rates = [utility] * len(estimate) if isinstance(utility, Utility) else list(utility)
    if len(rates) != len(estimate):
        raise RouterError(f"{len(rates)} utilities for {len(estimate)} queries: give one for all, or one per query")
    if switch is not None and len(switch) != len(estimate):
        raise RouterError(f"{len(switch)} switches for {len(estimate)} queries: give one per query, or none")
    bad = {name: seconds for name, seconds in load_s.items() if not np.isfinite(seconds) or seconds < 0}
    if bad:
        raise RouterError(f"load_s must be finite seconds >= 0, got {bad}")
    cost_weight = np.array([[rate.cost_weight] for rate in rates]).reshape(-1, 1)
    latency_weight = np.array([[rate.latency_weight] for rate in rates]).reshape(-1, 1)
    loads = np.array([load_s.get(name, 0.0) for name in estimate.experts])
    utilities: Floats = np.asarray(estimate.quality, dtype=np.float64) - latency_weight * loads
    if cost_weight.any():
        utilities -= cost_weight * known_costs(
            estimate, "a cost weight > 0 trades quality for cost", "set the cost weight to 0"
        )
    for row, (moved, rate) in enumerate(zip(switch or (), rates, strict=False)):
        if moved is not None and rate.switch_weight:
            utilities[row] -= [moved.price(expert, rate) for expert in estimate.experts]
    return utilities


def _weights(estimate: Estimate, utilities: Floats) -> Floats:
    """(n, m) weights >= 0, not normalised.

    `Estimate.weights * utility / quality` if the router gives weights, else exp((utility - best utility) / 0.1).
    """
    if estimate.weights is None:
        best = np.nanmax(utilities, axis=1, keepdims=True, initial=-np.inf)
        return np.asarray(np.nan_to_num(np.exp((utilities - best) / WEIGHT_TEMPERATURE)))
    quality = np.asarray(estimate.quality, dtype=np.float64)
    left = np.where(quality > 0, utilities.clip(0.0, None) / np.where(quality > 0, quality, 1.0), 1.0)
    return np.asarray(np.nan_to_num(estimate.weights * left))


def _permitted(
    estimate: Estimate, allowed: Collection[str] | Sequence[Collection[str] | None] | None
) -> NDArray[np.bool_]:
    """(n, m) bool: allowed by the caller, and of known quality. Every row has at least one."""
    masks: dict[frozenset[str] | None, NDArray[np.bool_]] = {}
    rows = []
    for i, names in enumerate(_allowed_per_query(estimate, allowed)):
        key = None if names is None else frozenset(names)
        if key not in masks:
            masks[key] = np.array([key is None or name in key for name in estimate.experts], dtype=bool)
        if not masks[key].any():
            asked = listing(sorted(key or ())) or "no expert"
            known = listing(estimate.experts)
            raise NoEligibleExpert(
                f"{_which(estimate, i)}allowed experts: {asked} may answer, but this router only knows {known}"
            )
        rows.append(masks[key])
    if not rows:
        return np.zeros(estimate.quality.shape, dtype=bool)
    permitted = np.stack(rows)
    known_quality: NDArray[np.bool_] = permitted & ~np.isnan(estimate.quality)
    some = _any_of_each_row(known_quality)
    if not some.all():
        i = int(some.argmin())
        names = [name for name, ok in zip(estimate.experts, permitted[i], strict=True) if ok]
        raise NoEligibleExpert(f"{_which(estimate, i)}quality: the router's estimate is NaN for {listing(names)}")
    return known_quality


def _allowed_per_query(
    estimate: Estimate, allowed: Collection[str] | Sequence[Collection[str] | None] | None
) -> Iterator[Collection[str] | None]:
    if isinstance(allowed, str):
        raise RouterError(f"allowed must be a collection of names, not the string {allowed!r}")
    entries = None if allowed is None else list(allowed)
    if entries is None or not entries or all(isinstance(entry, str) for entry in entries):
        names = None if entries is None else frozenset(str(entry) for entry in entries)
        yield from [names] * len(estimate)
        return
    if len(entries) != len(estimate):
        raise RouterError(f"{len(entries)} entries in allowed for {len(estimate)} queries: give one per query")
    for entry in entries:
        if isinstance(entry, str):
            raise RouterError(f"allowed mixes names and collections of names: {entry!r}")
        yield entry


def _any_of_each_row(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,) whether each row of an (n, m) mask has a True."""
    return np.asarray(mask.any(axis=1), dtype=bool)


def _which(estimate: Estimate, i: int) -> str:
    return f"query {i + 1} of {len(estimate)}: " if len(estimate) > 1 else ""


def _refused(estimate: Estimate) -> NDArray[np.bool_]:
    """(n,) whether the router abstains and no expert is eligible."""
    if estimate.abstained is None or estimate.eligible is None:
        return np.zeros(len(estimate), dtype=bool)
    return np.asarray(estimate.abstained & ~_any_of_each_row(estimate.eligible))


def _refusal(estimate: Estimate, i: int) -> RoutingDecision:
    return RoutingDecision(
        experts=(),
        weights=(),
        scores=(),
        confidence=0.0,
        label=None if estimate.labels is None else estimate.labels[i],
        abstained=True,
        reason="the router abstains" if estimate.reasons is None else estimate.reasons[i],
        truncated=estimate.truncated is not None and bool(estimate.truncated[i]),
    )


def _decision(
    estimate: Estimate,
    i: int,
    chosen: NDArray[np.intp],
    utilities: Floats,
    weights: Floats,
    overruled: bool,
    unchanged: bool,
) -> RoutingDecision:
    scores = utilities[chosen]
    shares = weights[chosen]
    if estimate.weights is None or not shares.any():
        shares = np.exp((scores - scores.max()) / WEIGHT_TEMPERATURE)
    quality = estimate.quality[i, chosen]
    confidence = quality[0] if estimate.confidence is None or not unchanged else estimate.confidence[i]
    return RoutingDecision(
        experts=tuple(estimate.experts[j] for j in chosen),
        weights=tuple((shares / shares.sum()).tolist()),
        scores=tuple(scores.tolist()),
        confidence=float(min(max(confidence, 0.0), 1.0)),
        label=None if estimate.labels is None else estimate.labels[i],
        abstained=estimate.abstained is not None and bool(estimate.abstained[i]),
        reason=_reason(estimate, i, chosen, overruled),
        truncated=estimate.truncated is not None and bool(estimate.truncated[i]),
        quality=tuple(quality.tolist()),
    )


def _reason(estimate: Estimate, i: int, chosen: NDArray[np.intp], overruled: bool) -> str:
    best = int(chosen[0])
    quality = f"{estimate.experts[best]} has an estimated quality of {estimate.quality[i, best]:.3f}"
    own = quality if estimate.reasons is None else estimate.reasons[i]
    if estimate.eligible is None or not overruled:
        return own
    preferred = [name for name, ok in zip(estimate.experts, estimate.eligible[i], strict=True) if ok]
    excluded = ", ".join(preferred) or "every choice of the router"
    why = f"the constraints exclude {excluded}; best of the allowed: {quality}"
    return why if estimate.reasons is None else f"{own}; {why}"
