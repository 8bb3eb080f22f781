"""The skills of a query: from the words of a keyword expert, or from the training queries nearest to its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Query, Words
from routers.errors import RouterError
from routers.kinds.skill.recruiting import Floats, share_of
from routers.kinds.skill.vocabulary import NONE, Indices, Match, counted
from routers.numeric.neighbours import SAMPLE_ROWS, Vectors, quantiles, self_distances, share_nearer, top_k

PREFIX = "texts."
"""Of the arrays' names in a saved state."""
LEAST_COSINE = 1e-3
"""Lower bound of the cosines that texts are weighted by."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Skills of n queries.

    Attributes:
        skills: (n, K) counts of each skill, or shares of the query; rows may be all zero.
        ood: (n,) in [0, 1].
        matches: n lists, the skill of each word of each query; `None` where texts were read.
    """

    skills: Floats
    ood: Floats
    matches: list[list[Match]] | None = None

    @property
    def shares(self) -> Floats:
        """(n, K) rows that sum to 1, or to 0 where no skill is known."""
        return share_of(self.skills)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n,) whether any skill is known."""
        return np.asarray(self.skills.any(axis=1), dtype=bool)

    def words(self, i: int) -> list[Match] | None:
        """Matches of the words of the i-th query; `None` where texts were read."""
        return None if self.matches is None else self.matches[i]


def read_words(matches: list[list[Match]], n_skills: int) -> Reading:
    """The skills of n queries whose words were looked up; `ood` is the share of words that are far from every skill."""
    skills, ood = np.zeros((len(matches), n_skills)), np.ones(len(matches))
    for row, of_query in enumerate(matches):
        known = [match.skill for match in of_query if match.skill != NONE]
        np.add.at(skills[row], known, 1.0)
        if of_query:
            ood[row] = 1.0 - len(known) / len(of_query)
    return Reading(skills, ood, matches)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledTexts:
    """R training queries of known skills; a new query has the skills of the nearest of them.

    Attributes:
        vectors: (R, dim).
        skills: (R, L) of each, padded with `NONE`; every row has at least one.
        distance_quantiles: distances of training queries to their nearest other one.
    """

    vectors: Vectors
    skills: Indices
    distance_quantiles: Floats

    @classmethod
    def of(cls, vectors: Vectors, skills: Indices) -> Self:
        """From (N, dim) embeddings and (N, L) skills; rows without skills are dropped."""
        some = (skills != NONE).any(axis=1)
        kept = np.ascontiguousarray(vectors[some])
        return cls(kept, np.ascontiguousarray(skills[some]), quantiles(self_distances(kept)))

    def read(self, x: Vectors, k: int, sharpness: float, n_skills: int) -> Reading:
        """The skills of the k nearest texts, weighted by their cosine to the power `sharpness`."""
        similarities, rows = top_k(x, self.vectors, min(k, len(self.vectors)))
        ood = share_nearer(1.0 - similarities[:, 0].astype(np.float64), self.distance_quantiles)
        return Reading(self._shares(similarities, rows, sharpness, n_skills), ood)

    def read_each_other(self, k: int, sharpness: float, n_skills: int) -> Floats:
        """(r, K) shares of training queries, at most `SAMPLE_ROWS` of them evenly spaced, read from the others."""
        n = len(self.vectors)
        if n == 1:
            return counted(self.skills, n_skills)
        own = np.unique(np.linspace(0, n - 1, min(n, SAMPLE_ROWS)).astype(np.intp))
        similarities, rows = top_k(self.vectors[own], self.vectors, min(k + 1, n))
        others = rows != own[:, None]
        others[others.all(axis=1), -1] = False  # more than k texts equal to it: drop the last of them instead
        shape = (len(own), rows.shape[1] - 1)
        return self._shares(similarities[others].reshape(shape), rows[others].reshape(shape), sharpness, n_skills)

    def _shares(self, similarities: Vectors, rows: NDArray[np.intp], sharpness: float, n_skills: int) -> Floats:
        weights = share_of(similarities.astype(np.float64).clip(LEAST_COSINE, 1.0) ** sharpness)
        found = self.skills[rows]  # (n, k, L)
        each = weights[:, :, None] * (found != NONE) / (found != NONE).sum(axis=2, keepdims=True)
        shares = np.zeros((len(rows), n_skills + 1))  # the last column takes the padding
        np.add.at(shares, (np.arange(len(rows))[:, None, None], found), each)
        return np.ascontiguousarray(shares[:, :n_skills])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything."""
        return {
            PREFIX + "vectors": self.vectors,
            PREFIX + "skills": self.skills,
            PREFIX + "distance_quantiles": self.distance_quantiles,
        }

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The reverse of `arrays()`.

        Raises:
            KeyError: something is missing.
        """
        return cls(arrays[PREFIX + "vectors"], arrays[PREFIX + "skills"], arrays[PREFIX + "distance_quantiles"])


def words_of(feature: str, queries: Sequence[Query]) -> list[Words]:
    """The words of a keyword expert for each of n queries.

    Raises:
        RouterError: a query lacks the feature, or it is not words.
    """
    # The caller runs the keyword expert and passes its words as a feature, like hidden states: routers need no engine.
    found = []
    for number, query in enumerate(queries, start=1):
        if feature not in query.features:
            raise RouterError(
                f"query {number} of {len(queries)} lacks the feature {feature!r}: this router recruits by the words "
                "that a keyword expert gives each query"
            )
        words = query.features[feature]
        if not isinstance(words, tuple | list) or not all(isinstance(word, str) for word in words):
            raise RouterError(f"query {number} of {len(queries)}: feature {feature!r} is not words but {words!r:.60}")
        found.append(tuple(words))
    return found
