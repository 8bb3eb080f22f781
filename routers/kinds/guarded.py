"""GuardedRouter: any router, with an abstention whose rate or risk is guaranteed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import GENERAL, Estimate, Query, RouterState
from routers.conversation import estimate as estimate_conversations
from routers.decision import decide
from routers.encoders.embed import LastBatch, embed
from routers.errors import InvalidSettings, RouterError
from routers.factory import TrainableRouter, build, router_class
from routers.fitted import EmbeddingRouter, under
from routers.numeric.conformal import conformal_p, conformal_threshold, risk_threshold
from routers.numeric.mahalanobis import Mahalanobis
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

Method = Literal["conformal", "risk", "calibrated"]
OnAbstain = Literal["generalist", "refuse"]
INNER_PREFIX = "inner."
CALIBRATION_SHARE = 0.2
"""Share of the rows to calibrate on by default."""
LEAST_CALIBRATION, LEAST_FITTED = 10, 6
"""Rows of a small table that are kept for each of the two parts by default."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GuardedSettings:
    """Settings of `GuardedRouter`.

    Attributes:
        kind: of the inner router; settings: its settings.
        alpha: the bound of `conformal` and `risk`, in (0, 1).
        least_quality: the limit of `calibrated`, in [0, 1].
        calibration_share: share of the rows to calibrate on, in (0, 1); with n of them the threshold moves the rate by
            about sqrt(alpha / n). `None` takes a fifth, and of a small table up to half, until the rows suffice.
        on_abstain: `generalist`, or `refuse`: the request ends with an error, unless its policy has a fallback.
        generalist: the expert that answers queries that abstain; `None` takes the best single expert of the table.
        seed: of the split.
    """

    kind: str = "category"
    settings: Mapping[str, Any] | None = None
    method: Method = "conformal"
    alpha: float = 0.05
    least_quality: float = 0.5
    calibration_share: float | None = None
    on_abstain: OnAbstain = "generalist"
    generalist: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind == GuardedRouter.kind:
            raise InvalidSettings("a guarded router guards a router of another kind: name that one")
        for name, value in (("alpha", self.alpha), ("calibration_share", self.calibration_share)):
            if value is not None and not 0 < value < 1:
                raise InvalidSettings(f"{name} must lie between 0 and 1, got {value}")
        check_range(self, "least_quality", high=1)
        check_choice(self, "method", get_args(Method))
        check_choice(self, "on_abstain", get_args(OnAbstain))


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """What calibration found.

    Attributes:
        experts: m names, those of the inner router.
        threshold: a query abstains whose nonconformity is above it (`conformal`), or whose confidence is at or below it
            (`risk`) or below it (`calibrated`).
        general: name of the generalist.
        calibration: (n,) sorted nonconformity scores of `conformal`; empty otherwise.
        distance: the nonconformity of `conformal`; `None` otherwise.
        curve: (2, p) confidence -> expected score of `calibrated`, as points of an increasing line; empty otherwise.
    """

    experts: tuple[str, ...]
    threshold: float
    general: str
    calibration: _Floats
    distance: Mahalanobis | None
    curve: _Floats

    @property
    def dim(self) -> int | None:
        """Dimensions of the embeddings; `None` where the guard reads none."""
        return None if self.distance is None else len(self.distance.mean)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        distance = {} if self.distance is None else self.distance.arrays()
        return {"calibration": self.calibration, "curve": self.curve, **distance}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values, which have no infinity."""
        threshold = self.threshold if math.isfinite(self.threshold) else str(self.threshold)
        return {"general_expert": self.general, "threshold": threshold}


class GuardedRouter(EmbeddingRouter[GuardedSettings, Guard]):
    """A router of any kind that abstains where it is unreliable, with a guarantee on how often.

    The rows are split at random: the inner router is fitted on one part, the threshold on the other, which it has not
    seen. For queries that are exchangeable with the calibration rows (`routers.numeric.conformal`):

    - `conformal`: P(abstains) <= alpha for queries like the calibration rows; the farther a query lies from the
      training prompts, the more likely it abstains. Nonconformity is the Mahalanobis distance to the prompts that the
      inner router was fitted on (`routers.numeric.mahalanobis`).
    - `risk`: E[1{answered} * (1 - score)] <= alpha: the share of all queries that the inner router's choice answers
      wrongly is at most alpha. It abstains where the confidence of the decision is at or below the threshold.
    - `calibrated`: abstains where the expected score of the decision is below `least_quality`. The expectation is an
      isotonic fit of score on confidence, which gives no guarantee in finite samples.

    The guarantees are about the router's own choice: by quality, among all experts it finds eligible. A cost weight or
    a constraint of the request changes the choice and leaves the abstention as it is. What an inner router abstains
    from stays abstained, in addition.

    The estimate is the inner one; where a query abstains its label is `general` and its only eligible expert the
    generalist, or none (`refuse`): then `decide` gives a decision without experts.
    """

    kind: ClassVar[str] = "guarded"
    Settings = GuardedSettings

    def __init__(self, encoder: Encoder, **settings: Any) -> None:
        super().__init__(encoder, **settings)
        self._shared = LastBatch(encoder)  # a query is encoded once, though router and guard both read it
        self.inner: TrainableRouter = build(self.settings.kind, self._shared, self.settings.settings)

    @property
    def requires(self) -> frozenset[str]:
        """What the inner router needs."""
        return self.inner.requires

    def fit(self, table: OutcomeTable) -> Self:
        """Fit the inner router on a part of n prompts with their scores, and the threshold on the rest.

        Raises:
            RouterError: too few calibration rows for this alpha, or an error of the inner router.
            InvalidSettings: an unknown generalist.
        """
        general = self._general(table)
        fitting, calibrating = self._split(len(table))
        self.inner.fit(table.select(fitting))
        held_out, distance = table.select(calibrating), None
        calibration, curve = np.zeros(0), np.zeros((2, 0))
        settings = self.settings
        if settings.method == "conformal":
            distance = Mahalanobis.of(embed(self.encoder, table.select(fitting).prompts))
            calibration = np.sort(distance.distance(embed(self.encoder, held_out.prompts)))
            threshold = conformal_threshold(calibration, settings.alpha)
        else:
            confidence, scores = self._decided(held_out)
            if settings.method == "risk":
                threshold = risk_threshold(confidence, 1.0 - scores, settings.alpha)
            else:
                threshold, curve = settings.least_quality, _isotonic(confidence, scores)
        self._model = Guard(table.experts, threshold, general, calibration, distance, curve)
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The inner estimate of n queries with the abstentions; see the class."""
        guard, inner = self.model, self.inner.estimate(queries)
        general = inner.experts.index(guard.general)
        measured = self._measured(guard, queries, inner)
        doubtful = self._doubtful(guard, measured)
        already = np.zeros(len(inner), dtype=bool) if inner.abstained is None else inner.abstained
        abstained = doubtful | already
        eligible = np.ones(inner.quality.shape, dtype=bool) if inner.eligible is None else inner.eligible.copy()
        refused = abstained if self.settings.on_abstain == "refuse" else np.zeros(len(inner), dtype=bool)
        eligible[abstained] = np.arange(len(inner.experts)) == general
        eligible[refused] = False
        return replace(
            inner,
            eligible=eligible,
            abstained=abstained,
            ood=1.0 - conformal_p(guard.calibration, measured) if self.settings.method == "conformal" else inner.ood,
            confidence=np.where(abstained, inner.quality[:, general].clip(0.0, 1.0), _confidence(inner)),
            labels=_labels(inner, abstained),
            reasons=tuple(
                self._reason(guard, float(measured[i]), bool(doubtful[i]), inner, i) for i in range(len(inner))
            ),
        )

    def state(self) -> RouterState:
        """The guard's state, with the inner router's under `inner.`."""
        own, inner = super().state(), self.inner.state()
        arrays = {INNER_PREFIX + name: array for name, array in inner.arrays.items()}
        return RouterState({**own.arrays, **arrays}, {**own.settings, "inner": dict(inner.settings)})

    def _restore(self, state: RouterState) -> None:
        arrays, values, settings = state.arrays, state.settings, self.settings
        inner = RouterState(under(INNER_PREFIX, arrays), values["inner"])
        self.inner = router_class(settings.kind).from_state(inner, self._shared)
        self._model = Guard(
            experts=self.inner.experts,
            threshold=float(values["threshold"]),
            general=values["general_expert"],
            calibration=arrays["calibration"],
            distance=Mahalanobis.restored(arrays) if settings.method == "conformal" else None,
            curve=arrays["curve"],
        )
        self._check_encoder()

    def _general(self, table: OutcomeTable) -> str:
        if self.settings.generalist is None:
            return table.experts[int(table.scores.mean(axis=0).argmax())]
        if self.settings.generalist not in table.experts:
            known = ", ".join(table.experts)
            raise InvalidSettings(f"the generalist {self.settings.generalist!r} is not in the table: {known}")
        return self.settings.generalist

    def _split(self, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to fit on and rows to calibrate on, both in their order."""
        count = self._calibration_rows(n)
        if count < LEAST_CALIBRATION or n - count < 1:
            share = self.settings.calibration_share or 0.5
            raise RouterError(
                f"calibration_share {share} of {n} rows leaves {count} to calibrate on: at least "
                f"{LEAST_CALIBRATION} are needed, so give more rows or a larger share"
            )
        shuffled = np.random.default_rng(self.settings.seed).permutation(n)
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])

    def _calibration_rows(self, n: int) -> int:
        """Number of rows to calibrate on, of n."""
        settings = self.settings
        if settings.calibration_share is not None:
            return round(n * settings.calibration_share)
        least = math.ceil(1 / settings.alpha) - 1 if settings.method == "risk" else 0  # what alpha needs to be met
        most = max(n // 2, min(LEAST_CALIBRATION, n - LEAST_FITTED))
        return max(round(n * CALIBRATION_SHARE), min(max(least, LEAST_CALIBRATION), most))

    def _decided(self, table: OutcomeTable) -> tuple[_Floats, _Floats]:
        """(n,) confidence of the inner router's choices, and (n,) their recorded scores."""
        estimate = estimate_conversations(self.inner, table.queries())
        chosen = [table.experts.index(decision.experts[0]) for decision in decide(estimate)]
        return _confidence(estimate), table.scores[np.arange(len(table)), chosen]

    def _measured(self, guard: Guard, queries: Sequence[Query], inner: Estimate) -> _Floats:
        """(n,) values that are compared with the threshold."""
        if guard.distance is not None:
            return guard.distance.distance(embed(self._shared, [query.text for query in queries]))
        confidence = _confidence(inner)
        return np.interp(confidence, *guard.curve) if self.settings.method == "calibrated" else confidence

    def _doubtful(self, guard: Guard, measured: _Floats) -> NDArray[np.bool_]:
        if self.settings.method == "conformal":
            return np.asarray(measured > guard.threshold)
        return np.asarray(measured <= guard.threshold if self.settings.method == "risk" else measured < guard.threshold)

    def _reason(self, guard: Guard, measured: float, doubtful: bool, inner: Estimate, i: int) -> str:
        if not doubtful:
            return _own_reason(inner, i)
        settings = self.settings
        what, sign, bound = {
            "conformal": ("distance to the training prompts", ">", f"at most {settings.alpha:.1%} of similar queries"),
            "risk": ("confidence", "<=", f"answered wrongly in at most {settings.alpha:.1%}"),
            "calibrated": ("expected score", "<", "the least that is accepted"),
        }[settings.method]
        who = "no expert answers" if self.settings.on_abstain == "refuse" else f"the generalist {guard.general} answers"
        return f"unsure, so {who}: {what} {measured:.3f} {sign} {guard.threshold:.3f} ({bound})"


def _confidence(estimate: Estimate) -> _Floats:
    """(n,) confidence of decisions by quality alone: the router's, or the quality of the best eligible expert."""
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
    """(2, p) points of the isotonic regression of score on confidence."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(out_of_bounds="clip").fit(confidence, scores)
    return np.stack([fitted.X_thresholds_, fitted.y_thresholds_]).astype(np.float64)
