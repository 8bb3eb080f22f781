"""ContrastiveRouter: query and expert vectors in one space, trained with RouterDC's contrastive losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.fitted import EmbeddingRouter
from routers.numeric.calibration import Platt, fit_platt
from routers.numeric.gradient import Parameters, Schedule, as_arrays, descend, one_thread, random_tensor, split_rows
from routers.numeric.kmeans import kmeans
from routers.numeric.neighbours import Vectors, top_k
from routers.settings import check_positive, check_range

if TYPE_CHECKING:
    import torch

    from routers.outcomes.table import OutcomeTable

LEAST_LENGTH = 1e-12
"""Lower bound of the lengths that vectors are divided by."""
_LAYERS = ("hidden", "hidden_bias", "head", "experts")

_Floats = NDArray[np.float64]
_Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ContrastiveSettings(Schedule):
    """Settings of `ContrastiveRouter`.

    Attributes:
        width: dimensions of the shared space.
        hidden: units of a hidden layer (ReLU); 0 for none.
        temperature: divides the cosines.
        sample_weight: weight of the sample-sample loss relative to the sample-LLM loss.
        n_clusters: number of clusters of the training queries for the sample-sample loss, at most the rows.
        learning_rate, weight_decay, epochs, batch: of AdamW; `epochs` is the most that are run.
        seed: of the initial values, the clusters, the held-out rows and all sampling.
    """

    width: int = 128
    hidden: int = 0
    temperature: float = 0.5
    sample_weight: float = 1.0
    n_clusters: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    epochs: int = 100
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "width", "n_clusters", low=1)
        check_range(self, "hidden", "sample_weight")
        check_positive(self, "temperature")
        Schedule.__post_init__(self)  # `super()` does not work in a class with slots


@dataclass(frozen=True, slots=True, eq=False)
class ContrastiveModel:
    """What training found, for m experts.

    Attributes:
        layers: `head` (width, d) and `experts` (d, m); with a hidden layer also `hidden` (dim, width), `hidden_bias`.
        mean_costs: (m,) USD, or `None`.
    """

    experts: tuple[str, ...]
    layers: _Arrays
    calibration: Platt
    mean_costs: _Floats | None

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.layers["hidden" if "hidden" in self.layers else "head"].shape[0])

    def cosines(self, x: Vectors) -> _Floats:
        """(n, m) cos(h, e_m) of (n, dim) embeddings."""
        layers = self.layers
        if "hidden" in layers:
            x = np.maximum(x @ layers["hidden"] + layers["hidden_bias"], 0.0)
        return np.asarray(_unit(x @ layers["head"], axis=1) @ _unit(layers["experts"], axis=0), dtype=np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        costs = {} if self.mean_costs is None else {"mean_costs": self.mean_costs}
        return {**self.layers, **self.calibration.arrays(), **costs}

    def values(self) -> dict[str, Any]:
        """Experts."""
        return {"experts": list(self.experts)}

    @classmethod
    def restored(
        cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: ContrastiveSettings
    ) -> Self:
        """The model of `arrays()` and `values()`."""
        layers = {name: arrays[name] for name in (_LAYERS if settings.hidden else _LAYERS[2:])}
        return cls(tuple(values["experts"]), layers, Platt.restored(arrays), arrays.get("mean_costs"))


class ContrastiveRouter(EmbeddingRouter[ContrastiveSettings, ContrastiveModel]):
    """Query and expert vectors in one space, trained contrastively; an expert's quality follows its cosine.

    From RouterDC (arXiv 2409.19886): logits cos(h, e_m) / temperature between the query's vector h and a learned vector
    of each expert, and its two losses (`routers.kinds.contrastive.losses`): sample-LLM, the three experts of highest
    score against the three of lowest, and sample-sample, a query of the same cluster against three of others. Ours: the
    encoder is frozen and h is a head over its embedding (linear, or with one hidden layer), where RouterDC trains all
    of mDeBERTa; clusters are k-means clusters of the embeddings; training stops at the least sample-LLM loss on
    held-out rows; and quality is the Platt scaling of the cosines, with a slope and offset for each expert, fitted on
    the held-out rows, because cosines have no calibrated level. The choice follows that quality.
    """

    kind: ClassVar[str] = "contrastive"
    Settings = ContrastiveSettings
    Model = ContrastiveModel

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n prompts with their scores.

        Raises:
            RouterError: embeddings that are not finite.
        """
        x = embed(self.encoder, table.prompts)
        rows, held_out = split_rows(len(x), self.settings.seed)
        with one_thread():
            layers = self._train(x, table.scores, rows, held_out)
        costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        uncalibrated = ContrastiveModel(table.experts, layers, _IDENTITY, costs)
        logits = uncalibrated.cosines(x[held_out]) / self.settings.temperature
        self._model = replace(uncalibrated, calibration=fit_platt(logits, table.scores[held_out]))
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score of each of the m experts on each of the n queries; costs are the training table's means."""
        model = self.model
        x, truncated = read_queries(self.encoder, queries)
        quality = model.calibration.probabilities(model.cosines(x) / self.settings.temperature)
        costs = None if model.mean_costs is None else np.tile(model.mean_costs, (len(queries), 1))
        return Estimate(model.experts, quality, costs, truncated=truncated)

    def _train(self, x: Vectors, scores: _Floats, rows: NDArray[np.intp], held_out: NDArray[np.intp]) -> _Arrays:
        import torch
        from torch.nn.functional import normalize

        from routers.kinds.contrastive.losses import sample_llm_loss, sample_sample_loss

        settings, seed = self.settings, self.settings.seed
        parameters = self._first(x.shape[1], scores.shape[1])
        inputs, wanted = torch.from_numpy(x), torch.from_numpy(scores.astype(np.float32))
        clusters = torch.from_numpy(top_k(x, kmeans(x, min(settings.n_clusters, len(x)), seed), 1)[1][:, 0])
        chance, unseen = torch.Generator().manual_seed(seed), torch.from_numpy(held_out)

        def against_experts(h: torch.Tensor, batch: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
            cosines = normalize(h, dim=1) @ normalize(parameters["experts"], dim=0)
            return sample_llm_loss(cosines / settings.temperature, wanted[batch], draws)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            h = _head(parameters, inputs[batch])
            total = against_experts(h, batch, chance)
            if settings.sample_weight:
                between = sample_sample_loss(h, clusters[batch], settings.temperature, chance)
                total = total + settings.sample_weight * between
            return total

        def check() -> float:  # with the same draws every time
            h = _head(parameters, inputs[unseen])
            return against_experts(h, unseen, torch.Generator().manual_seed(seed)).item()

        descend(parameters, loss, rows, settings, seed, check=check)
        return as_arrays(parameters)

    def _first(self, dim: int, n_experts: int) -> Parameters:
        import torch

        rng = np.random.default_rng(self.settings.seed)
        width, hidden = self.settings.width, self.settings.hidden
        wide = hidden or dim
        first = {
            "head": random_tensor((wide, width), wide**-0.5, rng),
            "experts": random_tensor((width, n_experts), width**-0.5, rng),
        }
        if hidden:
            first["hidden"] = random_tensor((dim, hidden), (2 / dim) ** 0.5, rng)
            first["hidden_bias"] = torch.zeros(hidden, requires_grad=True)
        return first


_IDENTITY = Platt(np.ones(1), np.zeros(1))


def _head(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    """(b, d) query vectors; the same as `ContrastiveModel.cosines` computes in numpy."""
    if "hidden" in parameters:
        x = (x @ parameters["hidden"] + parameters["hidden_bias"]).relu()
    return x @ parameters["head"]


def _unit(vectors: NDArray[np.float32], *, axis: int) -> NDArray[np.float32]:
    """Vectors along an axis divided by their length."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=axis, keepdims=True), LEAST_LENGTH))
