"""AutoRouter: tries kinds and settings on inner folds, then becomes the best, a stack, or the best single expert.

    router = AutoRouter(CachedEncoder(build_encoder("minilm")), budget_minutes=10)
    router.on_progress = print          # called with each `Row` of the scoreboard as it is known
    router.fit(table)
    router.scoreboard                   # every candidate: kind, settings, encoder, score, gain with interval, seconds
    router.choice                       # who was chosen, with what weights, and why
    router.expected                     # what to expect of it on new queries: NOT the figure that was selected on

The selection is part of `fit`, so that `cross_validate(lambda: AutoRouter(...))` is nested by construction. The
artifact holds the chosen routers whole, and the scoreboard beside them.
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
from routers.evaluation.cross_validation import stratified_folds
from routers.factory import ROUTERS, TrainableRouter, kind_of, reads_text, router_class, settings_of
from routers.kinds.auto.blend import blend
from routers.kinds.auto.candidates import BASELINE_KIND, CANDIDATES, Candidate, Row
from routers.kinds.auto.selection import Choice, Expected, Trial, choose, expect
from routers.kinds.auto.trials import Deadline, Workshop, tried

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

OnRow = Callable[[Row], None]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A fitted member of the router, with its weight and the name of its encoder (`None` where it reads no text)."""

    router: TrainableRouter
    weight: float
    encoder: str | None


class AutoRouter:
    """The best of several routers for a table, by cross-validation, with an honest estimate of what that is worth.

    `choose` and `expect` of `routers.kinds.auto.selection` say how. A candidate that fails (too few rows, say) or for
    which there is no time stands in the scoreboard with the reason.

    Args:
        encoder: the first encoder, and the one that the artifact names.
        encoders: names of further ones (`routers.encoders.build.build_encoder`); kinds that read text are tried with
        each. candidates: what is tried beside the best single expert, in this order. Kinds get this router's seed and
        label
            column where they have such settings and none are given.
        budget_minutes: how long `fit` may take. A candidate is not started, or not gone on with after its first fold,
            where what has been seen of it and of its kind says that it would take longer; `None` for no limit. The
            last fit of what is chosen comes on top.
        n_folds: inner folds, 3 or more.
        label_column: the table's column of categories when training; `None` takes its domains if it has any.
        more_labels: further columns of categories, for candidates that can use them.
        signals: names of `Query.features`; given some, `quality` is also tried with them.
        seed: of the folds, the intervals, and the candidates.
    """

    kind: ClassVar[str] = "auto"

    def __init__(
        self,
        encoder: Encoder,
        *,
        encoders: Sequence[str] = (),
        candidates: Sequence[Candidate] = CANDIDATES,
        budget_minutes: float | None = None,
        n_folds: int = 3,
        label_column: str | None = None,
        more_labels: Sequence[str] = (),
        signals: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if n_folds < 3:
            raise InvalidSettings(f"n_folds must be at least 3, so that a choice can be scored; got {n_folds}")
        if budget_minutes is not None and not budget_minutes > 0:
            raise InvalidSettings(f"budget_minutes must be positive, got {budget_minutes}")
        if unknown := [c.kind for c in candidates if c.kind not in ROUTERS or c.kind == self.kind]:
            raise InvalidSettings(
                f"{', '.join(unknown)} cannot be a candidate; there are: {', '.join(ROUTERS.names())}"
            )
        self.encoder = encoder
        self.encoders = tuple(encoders)
        self.candidates = tuple(candidates)
        self.budget_minutes = budget_minutes
        self.n_folds = n_folds
        self.label_column = label_column
        self.more_labels = tuple(more_labels)
        self.signals = tuple(signals)
        self.seed = seed
        self.on_progress: OnRow | None = None
        self.clock: Callable[[], float] = time.perf_counter
        self.scoreboard: tuple[Row, ...] = ()
        self._chosen: tuple[Chosen, ...] = ()
        self._choice: Choice | None = None
        self._expected: Expected | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts it was trained on; empty before `fit`."""
        return self._chosen[0].router.experts if self._chosen else ()

    @property
    def requires(self) -> frozenset[str]:
        """The signals it may use before `fit`, those that the chosen routers need after it."""
        if not self._chosen:
            return frozenset(self.signals)
        return frozenset().union(*(chosen.router.requires for chosen in self._chosen))

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """The fitted routers, heaviest first; raises RouterError before `fit`."""
        self._trained()
        return self._chosen

    @property
    def choice(self) -> Choice:
        """Which rows of the scoreboard were chosen, and why; raises RouterError before `fit`."""
        return self._trained()[0]

    @property
    def expected(self) -> Expected:
        """What to expect on new queries, from rows that the choice had not seen; raises RouterError before `fit`."""
        return self._trained()[1]

    def fit(self, table: OutcomeTable) -> Self:
        """Try every candidate on inner folds of n queries, choose, and fit the chosen on all of them.

        Raises:
            RouterError: signals that the table lacks, or fewer rows than folds.
        """
        if missing := sorted(set(self.signals) - set(table.features)):
            raise RouterError(f"this router needs features that the table does not have: {', '.join(missing)}")
        deadline = Deadline(self.clock, self.clock(), self.budget_minutes)
        encoders = self._encoders()
        defaults = {"seed": self.seed, "label_column": self.label_column, "more_labels": list(self.more_labels)}
        workshop = Workshop({name: Remembered(one, table.prompts) for name, one in encoders.items()}, defaults)
        folds = self._folds(table)
        board: list[Row] = []
        trials: dict[int, Trial] = {}  # by row of the scoreboard
        for row, trial in tried(self._all(encoders), workshop, table, folds, deadline, seed=self.seed):
            if trial is not None:
                trials[len(board)] = trial
            board.append(row)
            if self.on_progress is not None:
                self.on_progress(row)
        found = choose(list(trials.values()), table.scores, folds, seed=self.seed)
        rows = list(trials)
        self.scoreboard = tuple(board)
        self._choice = replace(found, members=tuple(rows[member] for member in found.members))
        self._expected = expect(list(trials.values()), table.scores, folds, seed=self.seed)
        self._chosen = tuple(
            _fitted(board[row].candidate, weight, workshop, table, encoders)
            for row, weight in zip(self._choice.members, self._choice.weights, strict=True)
        )
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The estimate of the chosen router, or the blend of several."""
        self._trained()
        return blend([c.router.estimate(queries) for c in self._chosen], [c.weight for c in self._chosen])

    def state(self) -> RouterState:
        """The chosen routers' states under `0.`, `1.`, ..., with the scoreboard."""
        choice, expected = self._trained()
        states = [chosen.router.state() for chosen in self._chosen]
        arrays = {f"{i}.{name}": array for i, state in enumerate(states) for name, array in state.arrays.items()}
        digests = {name: encoder.digest for name, encoder in self._encoders().items()}
        members = [
            {
                "kind": kind_of(chosen.router),
                "weight": chosen.weight,
                "encoder": chosen.encoder,
                "encoder_digest": None if chosen.encoder is None else digests[chosen.encoder],
                "state": dict(state.settings),
            }
            for chosen, state in zip(self._chosen, states, strict=True)
        ]
        configured = {
            "encoders": list(self.encoders),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "budget_minutes": self.budget_minutes,
            "n_folds": self.n_folds,
            "label_column": self.label_column,
            "more_labels": list(self.more_labels),
            "signals": list(self.signals),
            "seed": self.seed,
        }
        return RouterState(
            arrays,
            {
                "settings": configured,
                "chosen": members,
                "choice": asdict(choice),
                "expected": asdict(expected),
                "scoreboard": [asdict(row) for row in self.scoreboard],
            },
        )

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder) -> Self:
        """The router whose `state()` this is; encoders beside the first are built by their names.

        Raises:
            InvalidArtifact: something is missing, or an encoder is another one than in training.
        """
        try:
            settings = dict(state.settings["settings"])
            settings["candidates"] = [Candidate(**candidate) for candidate in settings["candidates"]]
            router = cls(encoder, **settings)
            router.scoreboard = tuple(_row(row) for row in state.settings["scoreboard"])
            choice = state.settings["choice"]
            router._choice = Choice(tuple(choice["members"]), tuple(choice["weights"]), choice["reason"])
            router._expected = Expected(**state.settings["expected"])
            router._chosen = tuple(
                _restored(member, _under(i, state.arrays), encoder) for i, member in enumerate(state.settings["chosen"])
            )
        except (KeyError, TypeError) as error:
            raise InvalidArtifact(f"the saved auto router lacks or misstates {error}: train it again") from error
        return router

    def _trained(self) -> tuple[Choice, Expected]:
        if self._choice is None or self._expected is None:
            raise RouterError("this auto router is not trained: call fit(table), or load a saved one")
        return self._choice, self._expected

    def _encoders(self) -> dict[str, Encoder]:
        others = [name for name in self.encoders if name != self.encoder.name]
        return {self.encoder.name: self.encoder, **{name: CachedEncoder(build_encoder(name)) for name in others}}

    def _folds(self, table: OutcomeTable) -> NDArray[np.intp]:
        """(n,) inner folds, with the categories spread evenly where there are any."""
        labelled = self.label_column is not None or table.domains is not None
        labels = table.labels(self.label_column or "domain") if labelled else ("",) * len(table)
        return np.asarray(stratified_folds(labels, self.n_folds, seed=self.seed), dtype=np.intp)

    def _all(self, encoders: Mapping[str, Any]) -> Iterator[Candidate]:
        """Every candidate with every encoder, the baseline first."""
        yield Candidate(BASELINE_KIND)
        for candidate in self.candidates:
            if candidate.kind == BASELINE_KIND:
                continue
            variants = [candidate]
            if self.signals and "signals" in settings_of(candidate.kind) and "signals" not in candidate.settings:
                variants.append(replace(candidate, settings={**candidate.settings, "signals": list(self.signals)}))
            for variant in variants:
                if candidate.encoder is not None or not reads_text(candidate.kind):
                    yield variant
                else:
                    yield from (replace(variant, encoder=name) for name in encoders)


def _fitted(
    candidate: Candidate, weight: float, workshop: Workshop, table: OutcomeTable, encoders: Mapping[str, Encoder]
) -> Chosen:
    """Fitted on the whole table, and then given the encoder itself, which is to read new queries."""
    router, name = workshop.built(candidate).fit(table), workshop.encoder_name(candidate)
    if name is None:
        return Chosen(router, weight, None)
    return Chosen(router_class(candidate.kind).from_state(router.state(), encoders[name]), weight, name)


def _row(row: Mapping[str, Any]) -> Row:
    return Row(**{**row, "candidate": Candidate(**row["candidate"])})


def _under(i: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    prefix = f"{i}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _restored(member: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], encoder: Encoder) -> Chosen:
    name = member["encoder"]
    reader = None
    if name is not None:
        reader = encoder if name == encoder.name else build_encoder(name)
        if reader.digest != member["encoder_digest"]:
            raise InvalidArtifact(
                f"a part of this auto router was trained with another encoder {name!r} than this one: train it again"
            )
    router = router_class(member["kind"]).from_state(RouterState(arrays, member["state"]), reader)
    return Chosen(router, member["weight"], name)
