"""QualityRouter: a calibrated estimate of each expert's score, stacked from several learners over several features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import InvalidSettings, RouterError
from routers.fitted import EmbeddingRouter
from routers.kinds.quality.features import Texts, fit_features
from routers.kinds.quality.learners import LEARNERS, cross_predict, fold_of, learner_class
from routers.kinds.quality.model import QualityModel, fit_costs
from routers.kinds.quality.stacking import fit_stack
from routers.numeric.neighbours import Vectors, quantiles, self_distances

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

STACKED = ("category", "ridge", "trees", "guided-trees", "residual-trees")
"""Learners by default. On recorded tables the others got little weight beside them or none, and `mlp` takes long."""
N_FOLDS = 3
LEAST_ROWS = 8
"""Three folds of fewer rows have nothing to learn from; an inner fold of a table of 20 rows has 13 or more."""
KEPT_VECTORS = 2048
"""Most training embeddings that are kept, evenly spaced, for the out-of-distribution score."""


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """Settings of `QualityRouter`.

    Attributes:
        learners: names in `routers.kinds.quality.learners.LEARNERS`.
        lexical, surface: whether to use these features.
        label_column: the table's column of categories when training; `None` takes its domains, if any. A query's own
            label is never read.
        more_labels: further columns of categories (finer ones, or a source).
        signals: names of `Query.features` to use; the router then requires them.
        seed: of the folds, the trees and the networks.
    """

    learners: Sequence[str] = STACKED
    lexical: bool = True
    surface: bool = True
    label_column: str | None = None
    more_labels: Sequence[str] = ()
    signals: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learners or len(set(self.learners)) < len(self.learners):
            raise InvalidSettings(
                f"learners must be different names out of {', '.join(LEARNERS)}; got {list(self.learners)}"
            )
        for name in self.learners:
            learner_class(name)


class QualityRouter(EmbeddingRouter[QualitySettings, QualityModel]):
    """Predicts each expert's score as a calibrated probability.

    Features (`routers.kinds.quality.features`): the embedding, TF-IDF of the words, surface features of the prompt,
    signals that the caller computes, and probabilities of the table's categories. Learners
    (`routers.kinds.quality.learners`) predict (n, m) scores from them; their predictions on held-out rows set the
    weight of each learner, the shrinkage of all of them to the experts' mean scores, and the curve that calibrates the
    result (`routers.kinds.quality.stacking`).

    The estimate has quality (n, m), a probability of a right answer where scores are 0 or 1; `cost_usd`, where the
    table has costs; `ood`, the share of training queries that lie nearer to another one than this query does; `labels`,
    the likeliest category. The confidence of a decision is the quality of its expert.

    No single paper: stacking is Wolpert's and Breiman's, the loss of the networks is the expected regret of a choice.
    """

    kind: ClassVar[str] = "quality"
    Settings = QualitySettings
    Model = QualityModel

    @property
    def requires(self) -> frozenset[str]:
        """The signals."""
        return frozenset(self.settings.signals)

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n prompts with their scores.

        Raises:
            RouterError: too few rows, signals that the table lacks, or embeddings that are not finite.
            InvalidOutcomes: a column of labels is not in the table.
        """
        if len(table) < LEAST_ROWS:
            raise RouterError(f"a quality router needs {LEAST_ROWS} training queries or more, got {len(table)}")
        if missing := sorted(self.requires - set(table.features)):
            raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
        settings = self.settings
        vectors, queries = embed(self.encoder, table.prompts), table.queries() if settings.signals else []
        texts = Texts(table.prompts, vectors, {name: _signal(name, queries) for name in settings.signals})
        main = [settings.label_column or "domain"] if settings.label_column or table.domains else []
        labels = [table.labels(column) for column in (*main, *settings.more_labels)]
        features, seen = fit_features(
            texts, labels, lexical=settings.lexical, surface_marks=settings.surface, seed=settings.seed
        )
        rng = np.random.default_rng(settings.seed)
        folds, y = fold_of(len(table), N_FOLDS, rng), table.scores
        classes = {name: learner_class(name) for name in settings.learners}
        held_out = [cross_predict(one, seen, y, folds, rng) for one in classes.values()]
        some = _some(vectors)
        self._model = QualityModel(
            experts=table.experts,
            features=features,
            members={name: c.fit(seen, y, rng) for name, c in classes.items()},
            stack=fit_stack(np.stack(held_out), y),
            costs=None if table.costs_usd is None else fit_costs(seen.x, table.costs_usd),
            vectors=some,
            distance_quantiles=quantiles(self_distances(some)),
        )
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score of each of the m experts on each of the n queries; see the class.

        Raises:
            RouterError: a query lacks a required feature.
        """
        model = self.model
        vectors, truncated = read_queries(self.encoder, queries)
        signals = {name: _signal(name, queries) for name in self.settings.signals}
        return model.estimate(Texts([query.text for query in queries], vectors, signals), truncated)


def _some(vectors: Vectors) -> Vectors:
    """At most `KEPT_VECTORS` rows, evenly spaced."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), KEPT_VECTORS)).astype(np.intp))
    return np.ascontiguousarray(vectors[rows])


def _signal(name: str, queries: Sequence[Query]) -> Vectors:
    """(n, d) values of one signal."""
    lacking = [i for i, query in enumerate(queries, start=1) if name not in query.features]
    if lacking:
        raise RouterError(f"query {lacking[0]} of {len(queries)} lacks the feature {name!r} that this router requires")
    if any(isinstance(query.features[name], tuple) for query in queries):
        raise RouterError(f"feature {name!r} is words: a quality router takes numbers; a skill router reads words")
    return np.array([np.atleast_1d(np.asarray(query.features[name])) for query in queries], dtype=np.float32)
