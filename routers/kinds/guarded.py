"""GuardedRouter: any router, with an abstention whose rate or risk is guaranteed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import GENERAL, Estimate, Query, RouterState
from routers.decision import decide
from routers.encoders.embed import LastBatch, check_dim, embed
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.factory import TrainableRouter
from routers.numeric.conformal import conformal_p, conformal_threshold, risk_threshold
from routers.numeric.mahalanobis import Mahalanobis

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

Method = Literal["conformal", "risk", "calibrated"]
OnAbstain = Literal["generalist", "refuse"]
INNER_PREFIX = "inner."
LEAST_CALIBRATION = 10

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Guard:
    """What calibration found.

    Attributes:
        threshold: a query abstains whose nonconformity is above it (`conformal`), or whose confidence is not (`risk`)
            or is below it (`calibrated`).
        general: name of the generalist.
        calibration: (n,) sorted nonconformity scores of `conformal`; empty otherwise.
        distance: the nonconformity of `conformal`; `None` otherwise.
        curve: (2, p) confidence -> expected score of `calibrated`, as points of a rising line; empty otherwise.
    """

    threshold: float
    general: str
    calibration: _Floats
    distance: Mahalanobis | None
    curve: _Floats


class GuardedRouter:
    """A router of any kind that holds back where it had better not be trusted, with a guarantee on how often.

    The rows are split by chance: the inner router is fitted on one part, the threshold on the other, which it has not
    seen. For queries that are exchangeable with the calibration rows (`routers.numeric.conformal`):

    - `conformal`: P(abstains) <= alpha, whatever is foreign abstaining as often as it is farther from the training
      prompts than they are from each other. Nonconformity is the Mahalanobis distance to the prompts that the inner
      router was fitted on (`routers.numeric.mahalanobis`).
    - `risk`: E[1{answered} * (1 - score)] <= alpha: of all queries, at most so many are answered by the inner router's
      choice and wrongly so. It abstains where the confidence of the decision is at or below the threshold.
    - `calibrated`: abstains where the expected score of the decision is below `least_quality`. The expectation is an
      isotonic fit of score on confidence, so this holds as well as that fit does: no guarantee in finite samples.

    The guarantees are about the router's own choice: by quality, among all experts it finds eligible. A cost weight or
    a constraint of the request changes the choice and leaves the abstention as it is. What an inner router abstains
    from by itself stays abstained, and comes on top.

    The estimate is the inner one; where a query abstains its label is `general`, its only eligible expert the
    generalist, or nobody (`refuse`): then `decide` gives a decision without experts.

    Args:
        kind: of the inner router; settings: its settings.
        alpha: the bound of `conformal` and `risk`, in (0, 1).
        least_quality: the limit of `calibrated`, in [0, 1].
        calibration_share: of the rows, in (0, 1); with n of them the threshold moves the rate by about sqrt(alpha / n).
        on_abstain: `generalist`, or `refuse`: the request ends with an error, unless its policy has a fallback.
        generalist: who answers then; `None` takes the best single expert of the table.
        seed: of the split.
    """

    kind: ClassVar[str] = "guarded"

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: str = "category",
        settings: Mapping[str, Any] | None = None,
        method: Method = "conformal",
        alpha: float = 0.05,
        least_quality: float = 0.5,
        calibration_share: float = 0.2,
        on_abstain: OnAbstain = "generalist",
        generalist: str | None = None,
        seed: int = 0,
    ) -> None:
        from routers.factory import build  # which knows this class by name

        if kind == self.kind:
            raise InvalidSettings("a guarded router guards a router of another kind: name that one")
        for name, value in (("alpha", alpha), ("calibration_share", calibration_share)):
            if not 0 < value < 1:
                raise InvalidSettings(f"{name} must lie between 0 and 1, got {value}")
        self.encoder = encoder
        self._shared = LastBatch(encoder)  # a query is encoded once, though two look at it
        self.inner: TrainableRouter = build(kind, self._shared, settings)
        self.settings = dict(settings or {})
        self.method, self.alpha, self.least_quality = method, alpha, least_quality
        self.calibration_share = calibration_share
        self.on_abstain, self.generalist, self.seed = on_abstain, generalist, seed
        self._guard: _Guard | None = None

    @property
    def requires(self) -> frozenset[str]:
        """What the inner router needs."""
        return self.inner.requires

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return self.inner.experts

    def fit(self, table: OutcomeTable) -> Self:
        """Fit the inner router on a part of n prompts with their scores, and the threshold on the rest.

        Raises:
            RouterError: too few rows to calibrate on for this alpha, or what the inner router refuses.
            InvalidSettings: an unknown generalist.
        """
        general = self._general(table)
        fitting, calibrating = self._split(len(table))
        self.inner.fit(table.select(fitting))
        held_out, distance = table.select(calibrating), None
        calibration, curve = np.zeros(0), np.zeros((2, 0))
        if self.method == "conformal":
            distance = Mahalanobis.of(embed(self.encoder, table.select(fitting).prompts))
            calibration = np.sort(distance.distance(embed(self.encoder, held_out.prompts)))
            threshold = conformal_threshold(calibration, self.alpha)
        else:
            confidence, scores = self._decided(held_out)
            if self.method == "risk":
                threshold = risk_threshold(confidence, 1.0 - scores, self.alpha)
            else:
                threshold, curve = self.least_quality, _isotonic(confidence, scores)
        self._guard = _Guard(threshold, general, calibration, distance, curve)
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The inner estimate of n queries, with who abstains; see the class."""
        guard, inner = self._trained(), self.inner.estimate(queries)
        general = inner.experts.index(guard.general)
        measured = self._measured(guard, queries, inner)
        doubtful = self._doubtful(guard, measured)
        already = np.zeros(len(inner), dtype=bool) if inner.abstained is None else inner.abstained
        abstained = doubtful | already
        eligible = np.ones(inner.quality.shape, dtype=bool) if inner.eligible is None else inner.eligible.copy()
        refused = abstained if self.on_abstain == "refuse" else np.zeros(len(inner), dtype=bool)
        eligible[abstained] = np.arange(len(inner.experts)) == general
        eligible[refused] = False
        return replace(
            inner,
            eligible=eligible,
            abstained=abstained,
            ood=1.0 - conformal_p(guard.calibration, measured) if self.method == "conformal" else inner.ood,
            confidence=np.where(abstained, inner.quality[:, general].clip(0.0, 1.0), _confidence(inner)),
            labels=_labels(inner, abstained),
            reasons=tuple(
                self._reason(guard, float(measured[i]), bool(doubtful[i]), inner, i) for i in range(len(inner))
            ),
        )

    def state(self) -> RouterState:
        """The inner router's state under `inner.`, and the guard's."""
        from routers.factory import kind_of

        guard, inner = self._trained(), self.inner.state()
        arrays = {INNER_PREFIX + name: array for name, array in inner.arrays.items()}
        arrays |= {"calibration": guard.calibration, "curve": guard.curve}
        if guard.distance is not None:
            arrays |= {"mean": guard.distance.mean, "whitening": guard.distance.whitening}
        settings = {
            "kind": kind_of(self.inner),
            "settings": self.settings,
            "method": self.method,
            "alpha": self.alpha,
            "least_quality": self.least_quality,
            "calibration_share": self.calibration_share,
            "on_abstain": self.on_abstain,
            "generalist": self.generalist,
            "seed": self.seed,
        }
        found = {"threshold": guard.threshold if math.isfinite(guard.threshold) else str(guard.threshold)}
        return RouterState(
            arrays, {"settings": settings, "general_expert": guard.general, **found, "inner": dict(inner.settings)}
        )

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        from routers.factory import kind_of, router_class

        inner = {n.removeprefix(INNER_PREFIX): a for n, a in state.arrays.items() if n.startswith(INNER_PREFIX)}
        try:
            router = cls(encoder, **state.settings["settings"])
            router.inner = router_class(kind_of(router.inner)).from_state(
                RouterState(inner, state.settings["inner"]), router._shared
            )
            conformal = router.method == "conformal"
            router._guard = _Guard(
                threshold=float(state.settings["threshold"]),
                general=state.settings["general_expert"],
                calibration=state.arrays["calibration"],
                distance=Mahalanobis(state.arrays["mean"], state.arrays["whitening"]) if conformal else None,
                curve=state.arrays["curve"],
            )
        except KeyError as error:
            raise InvalidArtifact(f"the saved guarded router lacks {error}: train it again") from error
        if router._guard.distance is not None:
            check_dim(encoder, router._guard.distance.mean, cls.kind)
        return router

    def _trained(self) -> _Guard:
        if self._guard is None:
            raise RouterError("this guarded router is not trained: call fit(table), or load a saved one")
        return self._guard

    def _general(self, table: OutcomeTable) -> str:
        if self.generalist is None:
            return table.experts[int(table.scores.mean(axis=0).argmax())]
        if self.generalist not in table.experts:
            raise InvalidSettings(f"the generalist {self.generalist!r} is not in the table: {', '.join(table.experts)}")
        return self.generalist

    def _split(self, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to fit on and rows to calibrate on, both in their order."""
        count = round(n * self.calibration_share)
        if count < LEAST_CALIBRATION or n - count < 1:
            raise RouterError(
                f"calibration_share {self.calibration_share} of {n} rows leaves {count} to calibrate on: at least "
                f"{LEAST_CALIBRATION} are needed, so give more rows or a larger share"
            )
        shuffled = np.random.default_rng(self.seed).permutation(n)
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])

    def _decided(self, table: OutcomeTable) -> tuple[_Floats, _Floats]:
        """(n,) confidence in the inner router's choices, and (n,) the scores that these really had."""
        estimate = self.inner.estimate(table.queries())
        chosen = [table.experts.index(decision.experts[0]) for decision in decide(estimate)]
        return _confidence(estimate), table.scores[np.arange(len(table)), chosen]

    def _measured(self, guard: _Guard, queries: Sequence[Query], inner: Estimate) -> _Floats:
        """(n,) what is compared with the threshold."""
        if guard.distance is not None:
            return guard.distance.distance(embed(self._shared, [query.text for query in queries]))
        confidence = _confidence(inner)
        return np.interp(confidence, *guard.curve) if self.method == "calibrated" else confidence

    def _doubtful(self, guard: _Guard, measured: _Floats) -> NDArray[np.bool_]:
        if self.method == "conformal":
            return np.asarray(measured > guard.threshold)
        return np.asarray(measured <= guard.threshold if self.method == "risk" else measured < guard.threshold)

    def _reason(self, guard: _Guard, measured: float, doubtful: bool, inner: Estimate, i: int) -> str:
        if not doubtful:
            return _own_reason(inner, i)
        what, sign, bound = {
            "conformal": ("distance to the training prompts", ">", f"at most {self.alpha:.1%} of familiar queries"),
            "risk": ("confidence", "<=", f"answered wrongly in at most {self.alpha:.1%}"),
            "calibrated": ("expected score", "<", "the least that is wanted"),
        }[self.method]
        who = "nobody answers" if self.on_abstain == "refuse" else f"the generalist {guard.general} answers"
        return f"unsure, so {who}: {what} {measured:.3f} {sign} {guard.threshold:.3f} ({bound})"


def _confidence(estimate: Estimate) -> _Floats:
    """(n,) of the decisions that quality alone makes: the router's own, or the quality of the best eligible expert."""
    if estimate.confidence is not None:
        return np.asarray(estimate.confidence, dtype=np.float64)
    quality = estimate.quality if estimate.eligible is None else np.where(estimate.eligible, estimate.quality, -np.inf)
    return np.asarray(np.nanmax(quality, axis=1), dtype=np.float64).clip(0.0, 1.0)


def _labels(inner: Estimate, abstained: NDArray[np.bool_]) -> tuple[str, ...] | None:
    if inner.labels is None:
        return None
    return tuple(GENERAL if a else label for label, a in zip(inner.labels, abstained, strict=True))


def _own_reason(inner: Estimate, i: int) -> str:
    if inner.reasons is not None:
        return inner.reasons[i]
    quality = inner.quality[i] if inner.eligible is None else np.where(inner.eligible[i], inner.quality[i], -np.inf)
    best = int(np.nanargmax(quality))
    return f"{inner.experts[best]} has an estimated quality of {quality[best]:.3f}"


def _isotonic(confidence: _Floats, scores: _Floats) -> _Floats:
    """(2, p) points of the rising line of least squares through (confidence, score)."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(out_of_bounds="clip").fit(confidence, scores)
    return np.stack([fitted.X_thresholds_, fitted.y_thresholds_]).astype(np.float64)
