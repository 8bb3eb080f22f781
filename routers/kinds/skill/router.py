"""SkillRouter: Symbolic-MoE's recruiting (arXiv 2503.05641), experts by the skills that a query needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.encoders.embed import embed, read_queries
from routers.errors import InvalidSettings, RouterError
from routers.fitted import EmbeddingRouter
from routers.kinds.skill.model import SkillModel
from routers.kinds.skill.reading import LabelledTexts, Reading, read_words, words_of
from routers.kinds.skill.recruiting import Explanation, Floats, WithoutSkills
from routers.kinds.skill.vocabulary import Indices, Vocabulary, counted, labelled, padded
from routers.settings import check_choice, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

MERGE_WORDS = 0.85
"""Default of `merge` for the words of a keyword expert."""


@dataclass(frozen=True, slots=True)
class SkillSettings:
    """Settings of `SkillRouter`.

    Attributes:
        skills: name of the feature with the words that a keyword expert gave a query (`keywords/<expert>`), which the
            router then requires; `None` reads the query's text.
        skill_column: the table's column of skills when texts are read: lists, or text with commas; `None` takes its
            domains. A query's own labels are never read.
        neighbours: labelled training queries that a text is compared with.
        sharpness: power of their cosines: the larger, the more the nearest of them count.
        merge: names whose embeddings have this cosine are the same skill. `None` takes 0.85 for words; the names of a
            column stay apart.
        floor: words of a lower cosine to every skill are unknown.
        shrinkage: accuracies and costs of a skill shrink to the table's means with the weight of this many queries.
        temperature: of the competencies; the lower, the more the best over all skills are preferred.
        without_skills: weights for a query without a known skill: `competency`, or `uniform`.
        reserve: experts that are not right more often than wrong on the query's skills are recruited after all others,
            instead of never (as in the paper), so that k experts are chosen where fewer are suitable.
        trim: least share of the training queries that an expert must be recruited for, to be recruited at all.
        trim_k: recruits per query when this is counted: the k of the selector, and the fewest experts that are kept.
    """

    skills: str | None = None
    skill_column: str | None = None
    neighbours: int = 20
    sharpness: float = 10.0
    merge: float | None = None
    floor: float = 0.3
    shrinkage: float = 20.0
    temperature: float = 0.5
    without_skills: WithoutSkills = "competency"
    reserve: bool = True
    trim: float = 0.05
    trim_k: int = 3

    def __post_init__(self) -> None:
        if self.skills is not None and self.skill_column is not None:
            raise InvalidSettings("give either skills (words of a keyword expert) or skill_column (labels), not both")
        check_choice(self, "without_skills", get_args(WithoutSkills))
        check_range(self, "neighbours", "trim_k", low=1)
        check_range(self, "sharpness", "shrinkage")
        check_range(self, "temperature", low=1e-3)
        check_range(self, "merge", "trim", high=1)
        check_range(self, "floor", low=-1, high=1)


@dataclass(frozen=True, slots=True, eq=False)
class TrainedSkills:
    """Vocabulary and profiles; texts is `None` where words are read."""

    vocabulary: Vocabulary
    profiles: SkillModel
    texts: LabelledTexts | None

    @property
    def experts(self) -> tuple[str, ...]:
        """m names."""
        return self.profiles.experts

    @property
    def dim(self) -> int:
        """Dimensions of the embeddings."""
        return int(self.vocabulary.vectors.shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Profiles, vocabulary, and the embeddings of training texts where texts are read."""
        texts = {} if self.texts is None else self.texts.arrays()
        return {**self.profiles.arrays(), **self.vocabulary.arrays(), **texts}

    def values(self) -> dict[str, Any]:
        """Experts and words."""
        return {"experts": list(self.experts), **self.vocabulary.settings()}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: SkillSettings) -> Self:
        """What `arrays()` and `values()` were taken from."""
        vocabulary = Vocabulary.restored(arrays, values)
        unknown, reserve = settings.without_skills, settings.reserve
        profiles = SkillModel.restored(arrays, values["experts"], vocabulary.names, unknown=unknown, reserve=reserve)
        return cls(vocabulary, profiles, None if settings.skills is not None else LabelledTexts.restored(arrays))


class SkillRouter(EmbeddingRouter[SkillSettings, TrainedSkills]):
    """Recruits experts by the skills that a query needs: those that were right where the skills were needed before.

    From the paper and its code: the profiles (+1 for every right, -1 for every wrong answer where a skill was needed),
    local suitability S_i, global competency gamma_i with temperature 0.5, weights S_i gamma_i over the experts with
    S_i > 0, the nearest known skill for new words, and the trimming of experts that are seldom recruited
    (`routers.kinds.skill.recruiting`). Ours: near-synonyms are one skill; words far from every skill are unknown;
    trimming follows the training queries; queries without a known skill are routed by competency instead of at random;
    skills without an LLM: a query has the skills of the labelled training queries nearest to it, in the share of their
    cosines; and `quality`, so that a skill router also works for a single expert, weighted votes and costs.

    The estimate has `quality` (n, m) = sum over skills of share x accuracy, `weights` (n, m), the recruiting weights, a
    row sums to 1 (used by the selector `recruit`), `labels`, the skill of the largest share, `ood`: the share of words
    that are far from every skill, or of training queries that lie nearer to another than this one does.
    """

    kind: ClassVar[str] = "skill"
    Settings = SkillSettings
    Model = TrainedSkills

    @property
    def requires(self) -> frozenset[str]:
        """The feature `skills`, where set."""
        return frozenset() if self.settings.skills is None else frozenset({self.settings.skills})

    def fit(self, table: OutcomeTable) -> Self:
        """Learn skills and profiles from n prompts with their scores.

        Raises:
            RouterError: the table lacks the feature `skills`, or it is not words; embeddings that are not finite.
            InvalidOutcomes: the column of skills is not in the table, or no row has any.
        """
        settings, named = self.settings, self._named(table)
        merge = MERGE_WORDS if settings.merge is None and settings.skills is not None else settings.merge
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
            temperature=settings.temperature,
            shrinkage=settings.shrinkage,
            unknown=settings.without_skills,
            reserve=settings.reserve,
        )
        texts = None if settings.skills is not None else LabelledTexts.of(embed(self.encoder, table.prompts), members)
        kept = model.trimmed(self._training_skills(members, texts, len(vocabulary)), settings.trim_k, settings.trim)
        self._model = TrainedSkills(vocabulary, replace(model, kept=kept), texts)
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected score and recruiting weight of each of the m experts on each of the n queries; see the class.

        Raises:
            RouterError: a query lacks the feature `skills`, or it is not words.
        """
        reading, truncated = self._read(queries)
        return replace(self.model.profiles.estimate(reading), truncated=truncated)

    def explain(self, query: Query) -> Explanation:
        """The skills of a query, how each was found, and every expert's figures.

        Raises:
            RouterError: the query lacks the feature `skills`, or it is not words.
        """
        reading, _ = self._read([query])
        return self.model.profiles.explain(reading)

    def _named(self, table: OutcomeTable) -> Sequence[tuple[str, ...]]:
        """Names of the skills of each of n rows."""
        if self.settings.skills is None:
            return labelled(table, self.settings.skill_column)
        if missing := sorted(self.requires - set(table.features)):
            raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
        return words_of(self.settings.skills, table.queries())

    def _training_skills(self, members: Indices, texts: LabelledTexts | None, n_skills: int) -> Floats:
        """(r, K) skills of training queries as the router reads them; rows without skills are left out."""
        if texts is not None:
            return texts.read_each_other(self.settings.neighbours, self.settings.sharpness, n_skills)
        counts = counted(members, n_skills)
        return counts[counts.any(axis=1)]

    def _read(self, queries: Sequence[Query]) -> tuple[Reading, NDArray[np.bool_] | None]:
        """The skills of n queries, and where texts are read whether each is truncated."""
        trained, settings = self.model, self.settings
        n_skills = len(trained.vocabulary)
        if trained.texts is None:
            words = words_of(settings.skills or "", queries)
            return read_words(trained.vocabulary.look_up(words, self.encoder, settings.floor), n_skills), None
        vectors, truncated = read_queries(self.encoder, queries)
        return trained.texts.read(vectors, settings.neighbours, settings.sharpness, n_skills), truncated
