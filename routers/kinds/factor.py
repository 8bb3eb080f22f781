"""FactorRouter: queries and experts as vectors in one small space; a score is their inner product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import InvalidSettings
from routers.fitted import EmbeddingRouter
from routers.numeric.calibration import Platt, fit_platt
from routers.numeric.gradient import Parameters, Schedule, as_arrays, descend, one_thread, random_tensor, split_rows
from routers.numeric.neighbours import Vectors
from routers.settings import check_range

if TYPE_CHECKING:
    import torch

    from routers.outcomes.table import OutcomeTable

LEAST_MEAN = 0.01
"""Mean scores are kept this far from 0 and 1 before they become the initial biases."""
EXPERT_SCALE = 0.1
"""Standard deviation of the experts' initial vectors: small, so that training starts at the mean scores."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FactorSettings(Schedule):
    """Settings of `FactorRouter`.

    Attributes:
        rank: dimensions of the shared space.
        learning_rate, weight_decay, epochs, batch: of AdamW; `epochs` is the most that are run.
        strong, weak: names of a pair; the router then knows only these two experts.
        seed: of the initial values, the held-out rows and the order of the rows.
    """

    rank: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    epochs: int = 150
    batch: int = 256
    strong: str | None = None
    weak: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "rank", low=1)
        if (self.strong is None) != (self.weak is None) or (self.strong is not None and self.strong == self.weak):
            raise InvalidSettings(f"a pair has two experts: got strong={self.strong!r} and weak={self.weak!r}")
        Schedule.__post_init__(self)  # `super()` does not work in a class with slots

    @property
    def pair(self) -> tuple[str, str] | None:
        """The strong and the weak expert; `None` without a pair."""
        return None if self.strong is None or self.weak is None else (self.strong, self.weak)


@dataclass(frozen=True, slots=True, eq=False)
class FactorModel:
    """What training found, for h targets: the m experts' scores, or of a pair the win and the mean score.

    Attributes:
        projection: (dim, rank); vectors: (rank, h); bias: (h,).
        mean_costs: (m,) USD, or `None`.
    """

    experts: tuple[str, ...]
    projection: NDArray[np.float32]
    vectors: NDArray[np.float32]
    bias: NDArray[np.float32]
    calibration: Platt
    mean_costs: _Floats | None
    paired: bool

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.projection.shape[0])

    def probabilities(self, x: Vectors) -> _Floats:
        """(n, h) of (n, dim) embeddings."""
        logits = (x @ self.projection) @ self.vectors + self.bias
        return self.calibration.probabilities(logits.astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        kept = {name: getattr(self, name) for name in ("projection", "vectors", "bias", "mean_costs")}
        return {name: array for name, array in kept.items() if array is not None} | self.calibration.arrays()

    def values(self) -> dict[str, Any]:
        """Everything else."""
        return {"experts": list(self.experts), "paired": self.paired}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: FactorSettings) -> Self:
        """The model of `arrays()` and `values()`."""
        layers = {name: arrays[name] for name in ("projection", "vectors", "bias")}
        costs, paired = arrays.get("mean_costs"), values["paired"]
        return cls(
            tuple(values["experts"]),
            **layers,
            calibration=Platt.restored(arrays),
            mean_costs=costs,
            paired=paired,
        )


class FactorRouter(EmbeddingRouter[FactorSettings, FactorModel]):
    """Matrix factorisation: the probability that expert m is right on query q is sigmoid(<W q, e_m> + b_m), calibrated.

    W projects the encoder's embedding to `rank` dimensions, e_m is the expert's vector. EmbedLLM (arXiv 2410.02223) and
    RouteLLM's router of this kind (arXiv 2406.18665) multiply W q and e_m elementwise and apply a linear layer; that
    layer is part of e_m here, which gives the same functions. As there, training minimises binary cross-entropy with
    Adam. Ours: early stopping and Platt scaling on held-out rows, a final fit on all rows for the same number of
    epochs, and biases that start at the mean scores.

    Pairs. For two experts, `strong` and `weak`, RouteLLM's objective is used: P(strong wins) = sigmoid(<W q, e_s - e_w>
    + b), by the Bradley-Terry likelihood, a tie counting half. 2 P - 1 is the expected difference of their scores. The
    mean of both scores is learned beside it, and quality is that mean plus and minus P - 1/2, so that it stays an
    expected score. The strong expert is chosen where 2 P - 1 > cost weight * (its additional cost): the cost weight
    sweeps the share of calls that go to it. A table of two experts is treated as a pair only when `strong` and `weak`
    are set: on recorded outcomes of two models the plain form had the larger area under the curve of calls.
    """

    kind: ClassVar[str] = "factor"
    Settings = FactorSettings
    Model = FactorModel

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n prompts with their scores; of a pair, the strong expert comes first in `experts`.

        Raises:
            InvalidOutcomes: an expert of the pair is not in the table.
            RouterError: embeddings that are not finite.
        """
        pair = self.settings.pair
        table = table if pair is None else table.with_experts(pair)
        x = embed(self.encoder, table.prompts)
        targets = table.scores if pair is None else _pair_targets(table.scores)
        with one_thread():
            arrays, calibration = self._train(x, targets, paired=pair is not None)
        costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        self._model = FactorModel(
            table.experts, **arrays, calibration=calibration, mean_costs=costs, paired=pair is not None
        )
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score of each of the m experts on each of the n queries; costs are the training table's means."""
        model = self.model
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

    def _train(self, x: Vectors, targets: _Floats, *, paired: bool) -> tuple[dict[str, NDArray[np.float32]], Platt]:
        """Train on a part to find the epochs and the calibration, then on all rows."""
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
            return parameters, descend(parameters, loss, rows, schedule, self.settings.seed, check=check)

        rows, held_out = split_rows(len(x), self.settings.seed)
        unseen = torch.from_numpy(held_out)
        part, epochs = train(rows, self.settings, unseen)
        found = logits(part, unseen).detach().numpy().astype(np.float64)
        # One slope and offset for all experts: the model knows their levels, own ones would only add noise.
        calibration = fit_platt(found, targets[held_out], shared=not paired)
        whole, _ = train(np.arange(len(x)), replace(self.settings, epochs=epochs), None)
        return as_arrays(whole), calibration

    def _first(self, dim: int, targets: _Floats) -> Parameters:
        import torch

        rng, rank = np.random.default_rng(self.settings.seed), self.settings.rank
        means = targets.mean(axis=0).clip(LEAST_MEAN, 1 - LEAST_MEAN)
        return {
            "projection": random_tensor((dim, rank), rank**-0.5, rng),
            "vectors": random_tensor((rank, targets.shape[1]), EXPERT_SCALE, rng),
            "bias": torch.from_numpy(np.log(means / (1 - means)).astype(np.float32)).requires_grad_(),
        }


def _pair_targets(scores: _Floats) -> _Floats:
    """(n, 2) of (n, 2) scores, strong and weak: the share of a win, and the mean of both."""
    strong, weak = scores[:, 0], scores[:, 1]
    return np.stack([(1 + strong - weak) / 2, (strong + weak) / 2], axis=1)


def _pair_quality(p: _Floats) -> _Floats:
    """(n, 2) expected scores of strong and weak: 2 P - 1 apart, around the mean, shifted to keep both in [0, 1]."""
    half = p[:, 0] - 0.5
    middle = p[:, 1].clip(np.abs(half), 1 - np.abs(half))
    return np.stack([middle + half, middle - half], axis=1).clip(0.0, 1.0)
