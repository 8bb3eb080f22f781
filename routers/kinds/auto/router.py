"""AutoRouter: evaluates kinds and settings on inner folds, then uses the best, a stack, or the best single expert.

    router = AutoRouter(CachedEncoder(build_encoder("minilm")), budget_minutes=10)
    router.on_progress = print          # called with each `ScoreboardRow` once it is known
    router.fit(table)
    router.model.scoreboard             # every candidate: kind, settings, encoder, score, gain with interval, seconds
    router.model.selection              # the chosen rows, their weights, and the reason
    router.model.expected               # expected score on new queries: NOT the figure that was selected on

The selection is part of `fit`, so that `cross_validate(lambda: AutoRouter(...))` is nested by construction. The
artifact holds the chosen routers in full, and the scoreboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.encoders.build import CachedEncoder, Encoder, build_encoder
from routers.encoders.remembered import Remembered
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.factory import ROUTERS, TrainableRouter, kind_of, reads_text, router_class, settings_of
from routers.fitted import EmbeddingRouter, under
from routers.kinds.auto.blend import blend
from routers.kinds.auto.candidates import BASELINE_KIND, CANDIDATES, SHRINKING_KIND, Candidate, ScoreboardRow
from routers.kinds.auto.selection import Expected, Selection, Trial, choose, expect
from routers.kinds.auto.trials import Deadline, Workshop, tried
from routers.numeric.folds import stratified_folds
from routers.settings import check_positive, check_range

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

OnRow = Callable[[ScoreboardRow], None]


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """Settings of `AutoRouter`.

    Attributes:
        encoders: names of further encoders (`routers.encoders.build.build_encoder`); kinds that read text are tried
            with each.
        candidates: what is tried after the best single expert, in this order. A kind gets this router's seed and label
            columns where it has such settings and none are given.
        budget_minutes: time limit of `fit`, `None` for none. A candidate is not started, or not continued after its
            first fold, where the time that it or its kind took before exceeds what is left. One candidate beside the
            best single expert is always finished. The last fit of the chosen routers comes on top.
        n_folds: inner folds, 3 or more.
        label_column: the table's column of categories when training; `None` takes its domains, if any.
        more_labels: further columns of categories, for candidates that can use them.
        signals: names of `Query.features`; with any, `quality` is also tried with them.
        seed: of the folds, the intervals, and the candidates.
    """

    encoders: Sequence[str] = ()
    candidates: Sequence[Candidate] = CANDIDATES
    budget_minutes: float | None = None
    n_folds: int = 3
    label_column: str | None = None
    more_labels: Sequence[str] = ()
    signals: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "n_folds", low=3)  # so that a choice can be scored
        check_positive(self, "budget_minutes")
        if unknown := [c.kind for c in self.candidates if c.kind not in ROUTERS or c.kind == AutoRouter.kind]:
            known = ", ".join(ROUTERS.names())
            raise InvalidSettings(f"{', '.join(unknown)} cannot be a candidate; there are: {known}")


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A fitted router of the selection, with its weight; encoder and digest are `None` where it reads no text."""

    router: TrainableRouter
    weight: float
    encoder: str | None
    encoder_digest: str | None

    def value(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        return {
            "kind": kind_of(self.router),
            "weight": self.weight,
            "encoder": self.encoder,
            "encoder_digest": self.encoder_digest,
            "state": dict(self.router.state().settings),
        }


@dataclass(frozen=True, slots=True, eq=False)
class AutoModel:
    """What the selection found.

    Attributes:
        members: the fitted routers, largest weight first.
        selection: which rows of the scoreboard were chosen, and why.
        expected: expected score on new queries, from rows that the selection had not seen.
        scoreboard: one row a candidate.
    """

    members: tuple[Member, ...]
    selection: Selection
    expected: Expected
    scoreboard: tuple[ScoreboardRow, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """m names."""
        return self.members[0].router.experts

    @property
    def dim(self) -> None:
        """`None`: the members check their own encoders."""
        return None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The members' arrays under `0.`, `1.`, ..."""
        parts = (member.router.state().arrays for member in self.members)
        return {f"{i}.{name}": array for i, arrays in enumerate(parts) for name, array in arrays.items()}

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "chosen": [member.value() for member in self.members],
            "choice": asdict(self.selection),
            "expected": asdict(self.expected),
            "scoreboard": [asdict(row) for row in self.scoreboard],
        }


class AutoRouter(EmbeddingRouter[AutoSettings, AutoModel]):
    """The best of several routers for a table, by cross-validation, with an unbiased estimate of its gain.

    For the method see `choose` and `expect` in `routers.kinds.auto.selection`. A candidate that fails (too few rows,
    say) or for which there is no time is in the scoreboard with the reason.

    Args:
        encoder: the first encoder, and the one that the artifact names.
    """

    kind: ClassVar[str] = "auto"
    Settings = AutoSettings

    def __init__(self, encoder: Encoder, **settings: Any) -> None:
        super().__init__(encoder, **settings)
        self.on_progress: OnRow | None = None
        self.clock: Callable[[], float] = time.perf_counter

    @property
    def requires(self) -> frozenset[str]:
        """The signals it may use before `fit`, those that the chosen routers need after it."""
        if self._model is None:
            return frozenset(self.settings.signals)
        return frozenset().union(*(member.router.requires for member in self._model.members))

    def fit(self, table: OutcomeTable) -> Self:
        """Evaluate every candidate on inner folds of n queries, select, and fit the selected routers on all of them.

        Raises:
            RouterError: signals that the table lacks, fewer rows than folds, or no candidate that can be fitted; the
                message has the reason of each.
        """
        settings, seed = self.settings, self.settings.seed
        if missing := sorted(set(settings.signals) - set(table.features)):
            raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
        deadline = Deadline(self.clock, self.clock(), settings.budget_minutes)
        encoders = self._encoders()
        defaults = {"seed": seed, "label_column": settings.label_column, "more_labels": list(settings.more_labels)}
        workshop = Workshop({name: Remembered(one, table.prompts) for name, one in encoders.items()}, defaults)
        folds = self._folds(table)
        board: list[ScoreboardRow] = []
        trials: dict[int, Trial] = {}  # by row of the scoreboard
        for row, trial in tried(self._all(encoders), workshop, table, folds, deadline, seed=seed):
            if trial is not None:
                trials[len(board)] = trial
            board.append(row)
            if self.on_progress is not None:
                self.on_progress(row)
        _check_tried(board)
        rows = list(trials)
        shrinking = [trial for trial, row in enumerate(rows) if board[row].candidate.kind == SHRINKING_KIND]
        found = choose(list(trials.values()), table.scores, folds, shrinking=shrinking, seed=seed)
        selection = replace(found, members=tuple(rows[member] for member in found.members))
        members = tuple(
            _fitted(board[row].candidate, weight, workshop, table, encoders)
            for row, weight in zip(selection.members, selection.weights, strict=True)
        )
        expected = expect(list(trials.values()), table.scores, folds, shrinking=shrinking, seed=seed)
        self._model = AutoModel(members, selection, expected, tuple(board))
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The estimate of the chosen router, or the blend of several."""
        members = self.model.members
        return blend([member.router.estimate(queries) for member in members], [member.weight for member in members])

    @classmethod
    def _unfitted(cls, settings: Mapping[str, Any], encoder: Encoder | None) -> Self:
        candidates = [Candidate(**candidate) for candidate in settings["candidates"]]
        return super()._unfitted({**settings, "candidates": candidates}, encoder)

    def _restore(self, state: RouterState) -> None:
        values, selection = state.settings, state.settings["choice"]
        members = (
            _restored(member, under(f"{i}.", state.arrays), self.encoder) for i, member in enumerate(values["chosen"])
        )
        self._model = AutoModel(
            tuple(members),
            Selection(tuple(selection["members"]), tuple(selection["weights"]), selection["reason"]),
            Expected(**values["expected"]),
            tuple(_row(row) for row in values["scoreboard"]),
        )

    def _encoders(self) -> dict[str, Encoder]:
        others = [name for name in self.settings.encoders if name != self.encoder.name]
        return {self.encoder.name: self.encoder, **{name: CachedEncoder(build_encoder(name)) for name in others}}

    def _folds(self, table: OutcomeTable) -> NDArray[np.intp]:
        """(n,) inner folds, stratified by category where there are any."""
        settings = self.settings
        labelled = settings.label_column is not None or table.domains is not None
        labels = table.labels(settings.label_column or "domain") if labelled else ("",) * len(table)
        return stratified_folds(labels, settings.n_folds, seed=settings.seed)

    def _all(self, encoders: Mapping[str, Any]) -> Iterator[Candidate]:
        """Every candidate with every encoder, the baseline first."""
        yield Candidate(BASELINE_KIND)
        for candidate in self.settings.candidates:
            if candidate.kind == BASELINE_KIND:
                continue
            variants, signals = [candidate], list(self.settings.signals)
            if signals and "signals" in settings_of(candidate.kind) and "signals" not in candidate.settings:
                variants.append(replace(candidate, settings={**candidate.settings, "signals": signals}))
            for variant in variants:
                if candidate.encoder is not None or not reads_text(candidate.kind):
                    yield variant
                else:
                    yield from (replace(variant, encoder=name) for name in encoders)


def _fitted(
    candidate: Candidate, weight: float, workshop: Workshop, table: OutcomeTable, encoders: Mapping[str, Encoder]
) -> Member:
    """Fit on the whole table with the remembered embeddings, then give it the encoder for new queries."""
    router, name = workshop.built(candidate).fit(table), workshop.encoder_name(candidate)
    if name is None:
        return Member(router, weight, None, None)
    encoder = encoders[name]
    read = router_class(candidate.kind).from_state(router.state(), encoder)
    return Member(read, weight, name, encoder.digest)


def _check_tried(board: Sequence[ScoreboardRow]) -> None:
    """Raise RouterError where there were candidates beside the best single expert, and none could be fitted."""
    others = [row for row in board if row.candidate.kind != BASELINE_KIND]
    if others and all(row.score is None for row in others):
        reasons = "".join(f"\n  - {row.candidate}: {row.skipped}" for row in others)
        raise RouterError(f"no candidate could be tried, so there is nothing to select from:{reasons}")


def _row(row: Mapping[str, Any]) -> ScoreboardRow:
    return ScoreboardRow(**{**row, "candidate": Candidate(**row["candidate"])})


def _restored(member: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], encoder: Encoder) -> Member:
    name = member["encoder"]
    reader = None
    if name is not None:
        reader = encoder if name == encoder.name else build_encoder(name)
        if reader.digest != member["encoder_digest"]:
            raise InvalidArtifact(
                f"a member of this auto router was trained with another encoder {name!r} than this one: train it again"
            )
    router = router_class(member["kind"]).from_state(RouterState(arrays, member["state"]), reader)
    return Member(router, member["weight"], name, member["encoder_digest"])
