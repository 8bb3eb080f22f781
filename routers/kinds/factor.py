"""FactorRouter: queries and experts as vectors in one small space; a score is their inner product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.embed import check_dim, embed, read_queries
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.numeric.calibration import Platt, fit_platt
from routers.numeric.gradient import Parameters, Schedule, as_arrays, descend, one_thread, random_tensor, split_rows
from routers.numeric.neighbours import Vectors

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

LEAST_MEAN = 0.01
"""Mean scores are kept so far from 0 and 1 where they become the first biases."""
EXPERT_SCALE = 0.1
"""Standard deviation of the experts' vectors before training: small, so that it begins at the mean scores."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """What training found; h targets: the m experts' scores, or of a pair who wins and how both do."""

    experts: tuple[str, ...]
    projection: NDArray[np.float32]  # (dim, rank)
    vectors: NDArray[np.float32]  # (rank, h)
    bias: NDArray[np.float32]  # (h,)
    calibration: Platt
    mean_costs: _Floats | None  # (m,)
    paired: bool

    def probabilities(self, x: Vectors) -> _Floats:
        """(n, h) of (n, dim) embeddings."""
        logits = (x @ self.projection) @ self.vectors + self.bias
        return self.calibration.probabilities(logits.astype(np.float64))


class FactorRouter:
    """Matrix factorisation: the probability that expert m is right on query q is sigmoid(<W q, e_m> + b_m), calibrated.

    W projects the encoder's embedding to `rank` dimensions, e_m is the expert's vector. EmbedLLM (arXiv 2410.02223) and
    RouteLLM's router of this kind (arXiv 2406.18665) multiply W q and e_m elementwise and let a linear layer follow;
    that layer is part of e_m here, which gives the same functions. As they do, it is trained by binary cross-entropy
    with Adam. Ours: where training stops and how it is calibrated (Platt, on held-out rows; then all rows are trained
    on for as many epochs), biases that begin at the mean scores.

    A pair. Of two experts, `strong` and `weak`, RouteLLM's mode is learned: P(strong wins) = sigmoid(<W q, e_s - e_w>
    + b), by the Bradley-Terry likelihood, a tie counting half. Then 2 P - 1 is the expected difference of their scores.
    So that quality stays an expected score, the mean of both is learned beside it: quality is that mean, plus and minus
    P - 1/2. The strong one is asked where 2 P - 1 > cost weight * (its additional cost): the cost weight sweeps the
    share of calls that go to it. A table of two experts is a pair only when told so: what each scores says more than
    who wins (on recorded outcomes of two models the plain form had the larger area under the curve of calls).

    Args:
        rank: dimensions of the shared space.
        learning_rate, weight_decay, epochs, batch: of the training; `epochs` at most.
        strong, weak: names of a pair; the router then knows only these two.
        seed: of the first values, the held-out rows and the order of the rows.
    """

    kind: ClassVar[str] = "factor"
    requires: frozenset[str] = frozenset()

    def __init__(
        self,
        encoder: Encoder,
        *,
        rank: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 1.0,
        epochs: int = 150,
        batch: int = 256,
        strong: str | None = None,
        weak: str | None = None,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise InvalidSettings(f"rank must be at least 1, got {rank}")
        if (strong is None) != (weak is None) or (strong is not None and strong == weak):
            raise InvalidSettings(f"a pair has two experts: got strong={strong!r} and weak={weak!r}")
        self.encoder = encoder
        self.rank = rank
        self.schedule = Schedule(learning_rate, weight_decay, epochs, batch)
        self.strong = strong
        self.weak = weak
        self.seed = seed
        self._model: _Model | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on, of a pair the strong one first; empty before `fit`."""
        return () if self._model is None else self._model.experts

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n prompts with their scores.

        Raises:
            InvalidOutcomes: an expert of the pair is not in the table.
            RouterError: embeddings that are not finite.
        """
        pair = None if self.strong is None or self.weak is None else (self.strong, self.weak)
        table = table if pair is None else table.with_experts(pair)
        x = embed(self.encoder, table.prompts)
        targets = table.scores if pair is None else _pair_targets(table.scores)
        with one_thread():
            arrays, calibration = self._train(x, targets, paired=pair is not None)
        costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        self._model = _Model(
            table.experts, **arrays, calibration=calibration, mean_costs=costs, paired=pair is not None
        )
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the m experts would score on each of the n queries; costs are the training table's means."""
        model = self._trained()
        x, truncated = read_queries(self.encoder, queries)
        p = model.probabilities(x)
        costs = None if model.mean_costs is None else np.tile(model.mean_costs, (len(queries), 1))
        reasons = None
        if model.paired:
            strong, weak = model.experts
            reasons = tuple(
                f"{strong} beats {weak} with probability {wins:.3f}, a tie counting half" for wins in p[:, 0]
            )
            p = _pair_quality(p)
        return Estimate(model.experts, p, costs, reasons=reasons, truncated=truncated)

    def state(self) -> RouterState:
        """The trained router as data."""
        model = self._trained()
        arrays: dict[str, NDArray[Any]] = {
            "projection": model.projection,
            "vectors": model.vectors,
            "bias": model.bias,
            "slope": model.calibration.slope,
            "offset": model.calibration.offset,
        }
        if model.mean_costs is not None:
            arrays["mean_costs"] = model.mean_costs
        return RouterState(
            arrays, {"settings": self._settings(), "experts": list(model.experts), "paired": model.paired}
        )

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        arrays, settings = state.arrays, state.settings
        try:
            router = cls(encoder, **settings["settings"])
            router._model = _Model(
                experts=tuple(settings["experts"]),
                projection=arrays["projection"],
                vectors=arrays["vectors"],
                bias=arrays["bias"],
                calibration=Platt(arrays["slope"], arrays["offset"]),
                mean_costs=arrays.get("mean_costs"),
                paired=settings["paired"],
            )
        except KeyError as error:
            raise InvalidArtifact(f"the saved factor router lacks {error}: train it again") from error
        check_dim(encoder, router._model.projection.T, cls.kind)
        return router

    def _settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "learning_rate": self.schedule.learning_rate,
            "weight_decay": self.schedule.weight_decay,
            "epochs": self.schedule.epochs,
            "batch": self.schedule.batch,
            "strong": self.strong,
            "weak": self.weak,
            "seed": self.seed,
        }

    def _trained(self) -> _Model:
        if self._model is None:
            raise RouterError("this factor router is not trained: call fit(table), or load a saved one")
        return self._model

    def _train(self, x: Vectors, targets: _Floats, *, paired: bool) -> tuple[dict[str, NDArray[np.float32]], Platt]:
        """Train on a part to find when to stop and how to calibrate, then on all rows."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

        inputs, wanted = torch.from_numpy(x), torch.from_numpy(targets.astype(np.float32))

        def logits(parameters: Parameters, rows: torch.Tensor) -> torch.Tensor:
            return inputs[rows] @ parameters["projection"] @ parameters["vectors"] + parameters["bias"]

        def train(rows: NDArray[np.intp], schedule: Schedule, held_out: torch.Tensor | None) -> tuple[Parameters, int]:
            parameters = self._first(x.shape[1], targets)

            def loss(batch: torch.Tensor) -> torch.Tensor:
                return cross_entropy(logits(parameters, batch), wanted[batch])

            check = None if held_out is None else lambda: loss(held_out).item()
            return parameters, descend(parameters, loss, rows, schedule, self.seed, check=check)

        rows, held_out = split_rows(len(x), self.seed)
        unseen = torch.from_numpy(held_out)
        part, epochs = train(rows, self.schedule, unseen)
        found = logits(part, unseen).detach().numpy().astype(np.float64)
        # One pair for all experts: the model knows their levels, pairs of their own would only add noise.
        calibration = fit_platt(found, targets[held_out], shared=not paired)
        whole, _ = train(np.arange(len(x)), replace(self.schedule, epochs=epochs), None)
        return as_arrays(whole), calibration

    def _first(self, dim: int, targets: _Floats) -> Parameters:
        import torch

        rng = np.random.default_rng(self.seed)
        means = targets.mean(axis=0).clip(LEAST_MEAN, 1 - LEAST_MEAN)
        return {
            "projection": random_tensor((dim, self.rank), self.rank**-0.5, rng),
            "vectors": random_tensor((self.rank, targets.shape[1]), EXPERT_SCALE, rng),
            "bias": torch.from_numpy(np.log(means / (1 - means)).astype(np.float32)).requires_grad_(),
        }


def _pair_targets(scores: _Floats) -> _Floats:
    """(n, 2) of (n, 2) scores, strong and weak: the share of a win, and the mean of both."""
    strong, weak = scores[:, 0], scores[:, 1]
    return np.stack([(1 + strong - weak) / 2, (strong + weak) / 2], axis=1)


def _pair_quality(p: _Floats) -> _Floats:
    """(n, 2) expected scores of strong and weak: 2 P - 1 apart, around a mean that gives way to keep both in [0, 1]."""
    half = p[:, 0] - 0.5
    middle = p[:, 1].clip(np.abs(half), 1 - np.abs(half))
    return np.stack([middle + half, middle - half], axis=1).clip(0.0, 1.0)
