"""ContrastiveRouter: a head over the encoder that draws queries to the experts that answer them well (RouterDC)."""

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
from routers.numeric.kmeans import kmeans
from routers.numeric.neighbours import Vectors, top_k

if TYPE_CHECKING:
    import torch

    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

LEAST_LENGTH = 1e-12
"""Vectors are divided by no less."""
_LAYERS = ("hidden", "hidden_bias", "head", "experts")

_Floats = NDArray[np.float64]
_Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """What training found, for m experts.

    layers: `head` (width, d) and `experts` (d, m); with a hidden layer also `hidden` (dim, width), `hidden_bias`.
    """

    experts: tuple[str, ...]
    layers: _Arrays
    calibration: Platt
    mean_costs: _Floats | None  # (m,)

    def cosines(self, x: Vectors) -> _Floats:
        """(n, m) cos(h, e_m) of (n, dim) embeddings."""
        layers = self.layers
        if "hidden" in layers:
            x = np.maximum(x @ layers["hidden"] + layers["hidden_bias"], 0.0)
        return np.asarray(_unit(x @ layers["head"], axis=1) @ _unit(layers["experts"], axis=0), dtype=np.float64)


class ContrastiveRouter:
    """Query and expert vectors in one space, trained contrastively; an expert is as good as it is near.

    From RouterDC (arXiv 2409.19886): logits cos(h, e_m) / temperature between the query's vector h and a learned vector
    of each expert, and its two losses (`routers.kinds.contrastive.losses`): sample-LLM, the three experts of highest
    score against the three of lowest, and sample-sample, a query of the same cluster against three of others. Ours: the
    encoder is frozen and h a head over its embedding (linear, or with one hidden layer) where RouterDC trains a
    mDeBERTa whole; k-means of the embeddings for the clusters; training stops where the sample-LLM loss of held-out
    rows is least; and cosines say nothing of levels, so that quality is their Platt scaling, an own pair for each
    expert, on the held-out rows. The choice is by that quality.

    Args:
        width: dimensions of the shared space.
        hidden: units of a hidden layer (ReLU); 0 for none.
        temperature: divides the cosines.
        sample_weight: of the sample-sample loss beside the other one.
        n_clusters: of the training queries, for that loss; fewer where there are fewer rows.
        learning_rate, weight_decay, epochs, batch: of the training; `epochs` at most.
        seed: of the first values, the clusters, the held-out rows, and all that is drawn.
    """

    kind: ClassVar[str] = "contrastive"
    requires: frozenset[str] = frozenset()

    def __init__(
        self,
        encoder: Encoder,
        *,
        width: int = 128,
        hidden: int = 0,
        temperature: float = 0.5,
        sample_weight: float = 1.0,
        n_clusters: int = 16,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        epochs: int = 100,
        batch: int = 256,
        seed: int = 0,
    ) -> None:
        for name, count, least in (("width", width, 1), ("hidden", hidden, 0), ("n_clusters", n_clusters, 1)):
            if count < least:
                raise InvalidSettings(f"{name} must be at least {least}, got {count}")
        if not temperature > 0:
            raise InvalidSettings(f"temperature must be positive, got {temperature}")
        if not sample_weight >= 0:
            raise InvalidSettings(f"sample_weight must be at least 0, got {sample_weight}")
        self.encoder = encoder
        self.width = width
        self.hidden = hidden
        self.temperature = temperature
        self.sample_weight = sample_weight
        self.n_clusters = n_clusters
        self.schedule = Schedule(learning_rate, weight_decay, epochs, batch)
        self.seed = seed
        self._model: _Model | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._model is None else self._model.experts

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n prompts with their scores.

        Raises:
            RouterError: embeddings that are not finite.
        """
        x = embed(self.encoder, table.prompts)
        rows, held_out = split_rows(len(x), self.seed)
        with one_thread():
            layers = self._train(x, table.scores, rows, held_out)
        costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        uncalibrated = _Model(table.experts, layers, _IDENTITY, costs)
        calibration = fit_platt(uncalibrated.cosines(x[held_out]) / self.temperature, table.scores[held_out])
        self._model = replace(uncalibrated, calibration=calibration)
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the m experts would score on each of the n queries; costs are the training table's means."""
        model = self._trained()
        x, truncated = read_queries(self.encoder, queries)
        quality = model.calibration.probabilities(model.cosines(x) / self.temperature)
        costs = None if model.mean_costs is None else np.tile(model.mean_costs, (len(queries), 1))
        return Estimate(model.experts, quality, costs, truncated=truncated)

    def state(self) -> RouterState:
        """The trained router as data."""
        model = self._trained()
        arrays: dict[str, NDArray[Any]] = {
            **model.layers,
            "slope": model.calibration.slope,
            "offset": model.calibration.offset,
        }
        if model.mean_costs is not None:
            arrays["mean_costs"] = model.mean_costs
        return RouterState(arrays, {"settings": self._settings(), "experts": list(model.experts)})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        arrays = state.arrays
        try:
            router = cls(encoder, **state.settings["settings"])
            wanted = _LAYERS if router.hidden else _LAYERS[2:]
            router._model = _Model(
                experts=tuple(state.settings["experts"]),
                layers={name: arrays[name] for name in wanted},
                calibration=Platt(arrays["slope"], arrays["offset"]),
                mean_costs=arrays.get("mean_costs"),
            )
        except KeyError as error:
            raise InvalidArtifact(f"the saved contrastive router lacks {error}: train it again") from error
        check_dim(encoder, router._model.layers[wanted[0]].T, cls.kind)
        return router

    def _settings(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "hidden": self.hidden,
            "temperature": self.temperature,
            "sample_weight": self.sample_weight,
            "n_clusters": self.n_clusters,
            "learning_rate": self.schedule.learning_rate,
            "weight_decay": self.schedule.weight_decay,
            "epochs": self.schedule.epochs,
            "batch": self.schedule.batch,
            "seed": self.seed,
        }

    def _trained(self) -> _Model:
        if self._model is None:
            raise RouterError("this contrastive router is not trained: call fit(table), or load a saved one")
        return self._model

    def _train(self, x: Vectors, scores: _Floats, rows: NDArray[np.intp], held_out: NDArray[np.intp]) -> _Arrays:
        import torch
        from torch.nn.functional import normalize

        from routers.kinds.contrastive.losses import sample_llm_loss, sample_sample_loss

        parameters = self._first(x.shape[1], scores.shape[1])
        inputs, wanted = torch.from_numpy(x), torch.from_numpy(scores.astype(np.float32))
        clusters = torch.from_numpy(top_k(x, kmeans(x, min(self.n_clusters, len(x)), self.seed), 1)[1][:, 0])
        chance, unseen = torch.Generator().manual_seed(self.seed), torch.from_numpy(held_out)

        def against_experts(h: torch.Tensor, batch: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
            cosines = normalize(h, dim=1) @ normalize(parameters["experts"], dim=0)
            return sample_llm_loss(cosines / self.temperature, wanted[batch], draws)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            h = _head(parameters, inputs[batch])
            total = against_experts(h, batch, chance)
            if self.sample_weight:
                between = sample_sample_loss(h, clusters[batch], self.temperature, chance)
                total = total + self.sample_weight * between
            return total

        def check() -> float:  # with the same draws every time
            h = _head(parameters, inputs[unseen])
            return against_experts(h, unseen, torch.Generator().manual_seed(self.seed)).item()

        descend(parameters, loss, rows, self.schedule, self.seed, check=check)
        return as_arrays(parameters)

    def _first(self, dim: int, n_experts: int) -> Parameters:
        import torch

        rng = np.random.default_rng(self.seed)
        wide = self.hidden or dim
        first = {
            "head": random_tensor((wide, self.width), wide**-0.5, rng),
            "experts": random_tensor((self.width, n_experts), self.width**-0.5, rng),
        }
        if self.hidden:
            first["hidden"] = random_tensor((dim, self.hidden), (2 / dim) ** 0.5, rng)
            first["hidden_bias"] = torch.zeros(self.hidden, requires_grad=True)
        return first


_IDENTITY = Platt(np.ones(1), np.zeros(1))


def _head(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    """(b, d) query vectors; the same as `_Model.cosines` computes in numpy."""
    if "hidden" in parameters:
        x = (x @ parameters["hidden"] + parameters["hidden_bias"]).relu()
    return x @ parameters["head"]


def _unit(vectors: NDArray[np.float32], *, axis: int) -> NDArray[np.float32]:
    """Vectors along an axis divided by their length."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=axis, keepdims=True), LEAST_LENGTH))
