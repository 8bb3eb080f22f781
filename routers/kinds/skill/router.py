"""SkillRouter: Symbolic-MoE's recruiting (arXiv 2503.05641), experts by the skills that a query needs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.embed import check_dim, embed, read_queries
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.skill.model import SkillModel
from routers.kinds.skill.reading import LabelledTexts, Reading, read_words, words_of
from routers.kinds.skill.recruiting import Explanation, Floats, WithoutSkills
from routers.kinds.skill.vocabulary import Indices, Vocabulary, counted, labelled, padded

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

MERGE_WORDS = 0.85
"""Words of a keyword expert whose embeddings have this cosine name the same skill, if nothing else is set."""


@dataclass(frozen=True, slots=True, eq=False)
class _Trained:
    vocabulary: Vocabulary
    model: SkillModel
    texts: LabelledTexts | None  # `None` where words are read


class SkillRouter:
    """Experts by the skills that a query needs: who was right where these were needed before is recruited.

    From the paper and its code: the profiles (+1 for every right, -1 for every wrong answer where a skill was needed),
    local suitability S_i, global competency gamma_i with temperature 0.5, weights S_i gamma_i over the experts with
    S_i > 0, new words that go to the nearest known skill, and the trimming of experts that are seldom recruited
    (`routers.kinds.skill.recruiting`). Ours: near-synonyms are one skill; words that are like no skill are unknown;
    trimming goes by the training queries; queries without a known skill are answered by competency instead of by
    chance; skills without an LLM: a query needs what the labelled training queries need that are most like it, in the
    share of their cosines; and `quality`, so that a skill router can be asked for one expert, weigh votes and price its
    experts.

    The estimate has `quality` (n, m) = sum over skills of share x accuracy, `weights` (n, m), the recruiting weights, a
    row sums to 1 (the selector `recruit` goes by them), `labels`, the skill of the largest share, `ood`: the share of
    words that are like no skill, or of training queries that lie nearer to another than this one does.

    Args:
        skills: name of the feature with the words that a keyword expert gave a query (`keywords/<expert>`), which the
            router then requires; `None` reads the query's text.
        skill_column: the table's column of skills when texts are read: lists, or text with commas; `None` takes its
            domains. A query's own labels are never read.
        neighbours: labelled training queries that a text is compared with.
        sharpness: how much more the nearest of them count: the power of their cosines.
        merge: names whose embeddings have this cosine are the same skill. `None` takes 0.85 for words; the names of a
            column, which somebody chose, stay apart.
        floor: words of a lower cosine to every skill are unknown.
        shrinkage: the accuracies and costs of a skill are averaged with so many queries of the table's mean.
        temperature: of the competencies; the lower, the more the best over all skills are preferred.
        without_skills: who is recruited for a query without a known skill: by `competency`, or `uniform`, all alike.
        reserve: experts who are not right more often than wrong where the query's skills were needed are recruited
            after all others, instead of never (as in the source): k are asked where fewer are suitable.
        trim: least share of the training queries that an expert must be recruited for, to be recruited at all.
        trim_k: recruits a query when this is counted: the k of the selector. So many are kept at least.
    """

    kind: ClassVar[str] = "skill"

    def __init__(
        self,
        encoder: Encoder,
        *,
        skills: str | None = None,
        skill_column: str | None = None,
        neighbours: int = 20,
        sharpness: float = 10.0,
        merge: float | None = None,
        floor: float = 0.3,
        shrinkage: float = 20.0,
        temperature: float = 0.5,
        without_skills: WithoutSkills = "competency",
        reserve: bool = True,
        trim: float = 0.05,
        trim_k: int = 3,
    ) -> None:
        if skills is not None and skill_column is not None:
            raise InvalidSettings("give either skills (words of a keyword expert) or skill_column (labels), not both")
        if without_skills not in get_args(WithoutSkills):
            raise InvalidSettings(f"without_skills must be 'competency' or 'uniform', got {without_skills!r}")
        for name, count in (("neighbours", neighbours), ("trim_k", trim_k)):
            _check(name, count, 1, np.inf)
        for name, value in (("sharpness", sharpness), ("shrinkage", shrinkage)):
            _check(name, value, 0, np.finfo(float).max)
        _check("temperature", temperature, 1e-3, np.finfo(float).max)
        _check("merge", 1.0 if merge is None else merge, 0, 1)
        _check("floor", floor, -1, 1)
        _check("trim", trim, 0, 1)
        self.encoder = encoder
        self.requires: frozenset[str] = frozenset() if skills is None else frozenset({skills})
        self.skills = skills
        self.skill_column = skill_column
        self.neighbours = neighbours
        self.sharpness = sharpness
        self.merge = merge
        self.floor = floor
        self.shrinkage = shrinkage
        self.temperature = temperature
        self.without_skills: WithoutSkills = without_skills
        self.reserve = reserve
        self.trim = trim
        self.trim_k = trim_k
        self._state: _Trained | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return () if self._state is None else self._state.model.experts

    @property
    def vocabulary(self) -> Vocabulary:
        """The skills that it knows.

        Raises:
            RouterError: it is not trained yet.
        """
        return self._trained().vocabulary

    def fit(self, table: OutcomeTable) -> Self:
        """Learn skills and profiles from n prompts with their scores.

        Raises:
            RouterError: the table lacks the feature `skills`, or it is not words; embeddings that are not finite.
            InvalidOutcomes: the column of skills is not in the table, or no row has any.
        """
        named = self._named(table)
        merge = MERGE_WORDS if self.merge is None and self.skills is not None else self.merge
        vocabulary = Vocabulary.learned(named, self.encoder, merge)
        if len(vocabulary) == 1:
            warnings.warn(
                f"every training query needs {vocabulary.names[0]!r} and nothing else, so this router always recruits "
                "the same experts: name another column as skill_column, or use kind 'knn'",
                stacklevel=2,
            )
        members = padded([vocabulary.skills_of(words) for words in named])
        model = SkillModel.learned(
            table.experts,
            vocabulary.names,
            table.scores,
            table.costs_usd,
            counted(members, len(vocabulary)),
            temperature=self.temperature,
            shrinkage=self.shrinkage,
            unknown=self.without_skills,
            reserve=self.reserve,
        )
        texts = None if self.skills is not None else LabelledTexts.of(embed(self.encoder, table.prompts), members)
        kept = model.trimmed(self._training_skills(members, texts, len(vocabulary)), self.trim_k, self.trim)
        self._state = _Trained(vocabulary, replace(model, kept=kept), texts)
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each of the m experts would score on each of the n queries, and its say; see the class.

        Raises:
            RouterError: a query lacks the feature `skills`, or it is not words.
        """
        reading, truncated = self._read(queries)
        return replace(self._trained().model.estimate(reading), truncated=truncated)

    def explain(self, query: Query) -> Explanation:
        """The skills of a query, how each was found, and what every expert brings to it.

        Raises:
            RouterError: the query lacks the feature `skills`, or it is not words.
        """
        reading, _ = self._read([query])
        return self._trained().model.explain(reading)

    def state(self) -> RouterState:
        """The trained router as data: vocabulary, profiles, and where texts are read their embeddings; no prompts."""
        trained = self._trained()
        arrays: dict[str, NDArray[Any]] = {**trained.model.arrays(), **trained.vocabulary.arrays()}
        if trained.texts is not None:
            arrays |= trained.texts.arrays()
        settings = {**trained.model.settings(), **trained.vocabulary.settings()}
        return RouterState(arrays, {"settings": self._settings(), **settings})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is.

        Raises:
            InvalidArtifact: something is missing, or the encoder has another dimension.
        """
        router = cls(encoder, **state.settings.get("settings", {}))
        try:
            vocabulary = Vocabulary.restored(state.arrays, state.settings)
            texts = None if router.skills is not None else LabelledTexts.restored(state.arrays)
        except KeyError as error:
            raise InvalidArtifact(f"the saved skill router lacks {error}: train it again") from error
        check_dim(encoder, vocabulary.vectors, cls.kind)
        model = SkillModel.restored(
            state.arrays, state.settings, vocabulary.names, router.without_skills, router.reserve
        )
        router._state = _Trained(vocabulary, model, texts)
        return router

    def _settings(self) -> dict[str, Any]:
        return {
            "skills": self.skills,
            "skill_column": self.skill_column,
            "neighbours": self.neighbours,
            "sharpness": self.sharpness,
            "merge": self.merge,
            "floor": self.floor,
            "shrinkage": self.shrinkage,
            "temperature": self.temperature,
            "without_skills": self.without_skills,
            "reserve": self.reserve,
            "trim": self.trim,
            "trim_k": self.trim_k,
        }

    def _trained(self) -> _Trained:
        if self._state is None:
            raise RouterError("this skill router is not trained: call fit(table), or load a saved one")
        return self._state

    def _named(self, table: OutcomeTable) -> Sequence[tuple[str, ...]]:
        """The names of skills that each of n rows is said to need."""
        if self.skills is None:
            return labelled(table, self.skill_column)
        if missing := sorted(self.requires - set(table.features)):
            raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
        return words_of(self.skills, table.queries())

    def _training_skills(self, members: Indices, texts: LabelledTexts | None, n_skills: int) -> Floats:
        """(r, K) the skills of training queries as the router would read them, of those that have some."""
        if texts is not None:
            return texts.read_each_other(self.neighbours, self.sharpness, n_skills)
        counts = counted(members, n_skills)
        return counts[counts.any(axis=1)]

    def _read(self, queries: Sequence[Query]) -> tuple[Reading, NDArray[np.bool_] | None]:
        """The skills of n queries, and where texts are read which of them are longer than what the encoder reads."""
        trained = self._trained()
        n_skills = len(trained.vocabulary)
        if trained.texts is None:
            words = words_of(self.skills or "", queries)
            return read_words(trained.vocabulary.look_up(words, self.encoder, self.floor), n_skills), None
        vectors, truncated = read_queries(self.encoder, queries)
        return trained.texts.read(vectors, self.neighbours, self.sharpness, n_skills), truncated


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidSettings(f"{name} must lie in [{low:g}, {high:g}], got {value}")
