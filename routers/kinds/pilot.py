"""PilotRouter: the expert whose pilot embeddings are most similar to the query (RouterRetriever)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import RouterError
from routers.fitted import EmbeddingRouter
from routers.numeric.calibration import fit_platt, sigmoid
from routers.numeric.neighbours import CHUNK_ROWS, SAMPLE_ROWS, Vectors, quantiles, share_nearer
from routers.outcomes.training_rows import TrainingRows
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

Similarity = Literal["mean", "max"]
LEAST_SLOPE: Final = 1e-3
"""Least slope of the calibration: a more similar expert always has the higher quality."""
NO_PILOT: Final = -1.0
"""Similarity of an expert that has no pilot embedding: the lowest cosine."""
SAME: Final = 1e-12
"""Scores that differ by less are equal."""
ALL: Final = "all"
"""The one dataset of a table without domains."""
_OWN: Final = ("pilots", "expert_of", "label_of", "calibration", "distance_quantiles")
"""Arrays of a model that are saved under their names."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PilotSettings:
    """Settings of `PilotRouter`.

    Attributes:
        label_column: the table's column of datasets when training; `None` takes its domains, or without domains one
            dataset. A query's own dataset is never read.
        similarity: of an expert: the `mean` over its pilot embeddings, or that of the nearest one (`max`).
        least_queries: training queries that a pilot embedding needs; an expert gets none of a dataset where it is best
            on fewer.
    """

    label_column: str | None = None
    similarity: Similarity = "mean"
    least_queries: int = 1

    def __post_init__(self) -> None:
        check_choice(self, "similarity", get_args(Similarity))
        check_range(self, "least_queries", low=1)


@dataclass(frozen=True, slots=True, eq=False)
class PilotData:
    """N training queries: outcomes, (N, dim) embeddings and N names of datasets.

    They are kept so that `coe router update` learns more without encoding again.
    """

    rows: TrainingRows
    vectors: Vectors
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PilotModel:
    """P pilot embeddings of m experts, ordered by expert.

    Attributes:
        pilots: (P, dim), of length 1.
        expert_of: (P,) column of each pilot's expert; label_of: (P,) its dataset, as a position in `names`.
        names: of the datasets.
        calibration: (2,) slope and offset: quality = sigmoid(slope * similarity + offset).
        distance_quantiles: distances of training queries to their nearest pilot of other queries.
    """

    data: PilotData
    pilots: Vectors
    expert_of: _Ints
    label_of: _Ints
    names: tuple[str, ...]
    calibration: _Floats
    distance_quantiles: _Floats

    @classmethod
    def of(cls, data: PilotData, settings: PilotSettings) -> Self:
        """Average the embeddings of the queries that each expert is best on, by dataset.

        Raises:
            RouterError: no expert is best on `least_queries` queries of a dataset.
        """
        names, label = np.unique(np.array(data.labels, dtype=object), return_inverse=True)
        shares = best_shares(data.rows.scores)
        found = [_pilots(data.vectors, shares, label == i) for i in range(len(names))]
        sums, counts = np.stack([each[0] for each in found]), np.stack([each[1] for each in found])
        lengths = np.linalg.norm(sums, axis=2)
        expert_of, label_of = np.nonzero(((counts >= settings.least_queries) & (lengths > 0)).T)
        if not len(expert_of):
            raise RouterError(
                f"no expert is best on {settings.least_queries} training queries of a dataset, of {len(data.rows)} "
                "queries in all: lower least_queries or add queries"
            )
        pilots = (sums[label_of, expert_of] / lengths[label_of, expert_of][:, None]).astype(np.float32)
        model = cls(data, pilots, expert_of, label_of, tuple(map(str, names)), np.array([1.0, 0.0]), np.zeros(1))
        rows = np.unique(np.linspace(0, len(label) - 1, min(len(label), SAMPLE_ROWS)).astype(np.intp))
        others = model._to_others(rows, shares[rows], label[rows], sums, settings)
        platt = fit_platt(others[0], data.rows.scores[rows], shared=True)
        calibration = np.array([max(float(platt.slope[0]), LEAST_SLOPE), float(platt.offset[0])])
        return replace(model, calibration=calibration, distance_quantiles=quantiles(1.0 - others[1]))

    @property
    def experts(self) -> tuple[str, ...]:
        """m names."""
        return self.data.rows.experts

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.pilots.shape[1])

    def similarities(self, cosines: _Floats, similarity: Similarity) -> _Floats:
        """(n, m) similarities of queries to experts from (n, P) cosines with pilots; NaN marks a pilot to leave out."""
        found = np.full((len(cosines), len(self.experts)), NO_PILOT)
        experts, starts = np.unique(self.expert_of, return_index=True)
        there = ~np.isnan(cosines)
        if similarity == "max":
            found[:, experts] = np.maximum.reduceat(np.where(there, cosines, NO_PILOT), starts, axis=1)
            return found
        totals = np.add.reduceat(np.where(there, cosines, 0.0), starts, axis=1)
        counts = np.add.reduceat(there, starts, axis=1, dtype=np.int64)
        found[:, experts] = np.where(counts > 0, totals / np.maximum(counts, 1), NO_PILOT)
        return found

    def qualities(self, similarities: _Floats) -> _Floats:
        """Expected scores: the same increasing function of every expert's similarity."""
        return sigmoid(self.calibration[0] * similarities + self.calibration[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Pilots, calibration, and the training rows with their embeddings and datasets."""
        place = {name: i for i, name in enumerate(self.names)}
        labels = np.array([place[label] for label in self.data.labels], dtype=np.int32)
        kept = {"vectors": self.data.vectors, "labels": labels}
        return {**{name: getattr(self, name) for name in _OWN}, **kept, **self.data.rows.arrays()}

    def values(self) -> dict[str, Any]:
        """Experts, domains and datasets."""
        return {**self.data.rows.settings(), "datasets": list(self.names)}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: PilotSettings) -> Self:
        """The model of `arrays()` and `values()`."""
        names = tuple(values["datasets"])
        labels = tuple(names[i] for i in arrays["labels"])
        data = PilotData(TrainingRows.restored(arrays, values), arrays["vectors"], labels)
        return cls(data, names=names, **{name: arrays[name] for name in _OWN})

    def _to_others(
        self, rows: NDArray[np.intp], shares: _Floats, label: _Ints, sums: _Floats, settings: PilotSettings
    ) -> tuple[_Floats, _Floats]:
        """(n, m) similarities and (n,) cosines with the nearest pilot of n training queries, each left out of its own
        pilots: else the calibration would read what it predicts.

        Args:
            rows: n of the training queries. shares: (n, m). label: (n,). sums: (datasets, m, dim).
        """
        similarities, nearest = np.empty((len(rows), len(self.experts))), np.empty(len(rows))
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            vectors = self.data.vectors[rows[part]].astype(np.float64)
            cosines = vectors @ self.pilots.T.astype(np.float64)
            own = np.where(label[part][:, None] == self.label_of, shares[part][:, self.expert_of], 0.0)
            at, pilot = np.nonzero(own)
            rest = sums[self.label_of[pilot], self.expert_of[pilot]] - own[at, pilot][:, None] * vectors[at]
            length = np.linalg.norm(rest, axis=1)
            cosine = np.einsum("ij,ij->i", rest, vectors[at]) / np.maximum(length, SAME)
            cosines[at, pilot] = np.where(length > 1e-6, cosine, np.nan)
            similarities[part] = self.similarities(cosines, settings.similarity)
            nearest[part] = np.where(np.isnan(cosines), NO_PILOT, cosines).max(axis=1)
        return similarities, nearest


class PilotRouter(EmbeddingRouter[PilotSettings, PilotModel]):
    """The expert of highest mean similarity to its pilot embeddings, for experts that are embedding models.

    From RouterRetriever (arXiv 2409.02685): every training query is labelled with its best expert, that of the highest
    score (nDCG@10 of retrieval with the expert's embeddings); for each dataset d and expert m the pilot embedding p_dm
    is the centroid, in the base encoder, of the queries of d with that label; a query q goes to

        argmax over m of the mean over d of cos(q, p_dm)

    so a new expert needs no training: pilot embeddings of the queries that it is best on are added.

    Ours: a query with several best experts counts in the centroid of each, divided by their number, and one on which
    all experts score equally is left out, since it says nothing of their difference. `quality` is the similarity on
    the scale of scores, by one increasing logistic function for all experts (Platt; each training query is left out of
    its own centroids for it), so that the ranking is the paper's. An expert that is best nowhere has the similarity -1:
    it is chosen only if constraints remove all others. An expert's cost is its mean over the training queries. With
    `similarity="max"` the nearest pilot embedding decides in place of the mean: where most experts have a pilot in most
    datasets, the means differ little.
    """

    kind: ClassVar[str] = "pilot"
    Settings = PilotSettings
    Model = PilotModel

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table; raises RouterError before `fit`."""
        return self.model.data.rows

    def fit(self, table: OutcomeTable) -> Self:
        """Compute the pilot embeddings of n queries and m experts.

        Raises:
            InvalidOutcomes: `label_column` is not in the table.
            RouterError: no expert is best on `least_queries` queries of a dataset, or embeddings are not finite.
        """
        labels = self._labels(table)
        data = PilotData(TrainingRows.of(table), embed(self.encoder, table.prompts), labels)
        self._model = PilotModel.of(data, self.settings)
        return self

    def extended(self, table: OutcomeTable) -> Self:
        """A router with n further rows, equal to one fitted on all rows. Only the new prompts are encoded."""
        data, labels = self.model.data, self._labels(table)
        vectors = np.vstack([data.vectors, embed(self.encoder, table.prompts)])
        more = PilotData(data.rows.joined(TrainingRows.of(table)), vectors, data.labels + labels)
        return self.with_model(PilotModel.of(more, self.settings))

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router with other outcomes of the same queries, equal to one fitted on them. Nothing is encoded."""
        return self.with_model(PilotModel.of(replace(self.model.data, rows=rows), self.settings))

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score and mean cost of each of the m experts for each of the n queries."""
        model = self.model
        vectors, truncated = read_queries(self.encoder, queries)
        cosines = vectors.astype(np.float64) @ model.pilots.T.astype(np.float64)
        costs = None if model.data.rows.costs is None else model.data.rows.costs.mean(axis=0)
        return Estimate(
            experts=model.experts,
            quality=model.qualities(model.similarities(cosines, self.settings.similarity)),
            cost_usd=None if costs is None else np.tile(costs, (len(queries), 1)),
            ood=share_nearer(1.0 - cosines.max(axis=1), model.distance_quantiles),
            labels=tuple(model.names[model.label_of[pilot]] for pilot in cosines.argmax(axis=1)),
            truncated=truncated,
        )

    def _labels(self, table: OutcomeTable) -> tuple[str, ...]:
        """The dataset of each row."""
        if self.settings.label_column is None and table.domains is None:
            return (ALL,) * len(table)
        return table.labels(self.settings.label_column or "domain")


def best_shares(scores: _Floats) -> _Floats:
    """(N, m) share of each query in each expert's centroid: 1 / k for the k experts of its highest score, else 0.

    A query on which all experts score equally has none, unless all queries are such.
    """
    best = scores >= scores.max(axis=1, keepdims=True) - SAME
    telling = ~best.all(axis=1)
    if telling.any():
        best = best & telling[:, None]
    return np.asarray(best / np.maximum(best.sum(axis=1, keepdims=True), 1))


def _pilots(vectors: Vectors, shares: _Floats, rows: NDArray[np.bool_]) -> tuple[_Floats, _Ints]:
    """(m, dim) weighted sums of the embeddings of one dataset, and (m,) queries in each."""
    own = shares[rows]
    return own.T @ vectors[rows].astype(np.float64), (own > 0).sum(axis=0)
