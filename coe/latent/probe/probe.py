"""Where can a label be read from the hidden states of an expert? Found before anything is trained.

A logistic regression on the states of one layer at one place predicts the labels of rows that it was not fitted on (k
folds; dimensions standardised on the training rows). A cell that it reads is a place where notes carry what the expert
knows; what no cell holds cannot be passed on by states of the prompt. Beside the cells stand:

    chance, majority    1 / number of labels, and the share of the most frequent label
    text                the same regression on character n-grams of the text: what is readable without any expert
    answer              how often the expert's own greedy answer is right

Rows of one group are in one fold, so that no fold tests on a text or a word that it was fitted on. The folds are the
same for all cells and wordings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from coe.errors import ConfigError, Rejected
from coe.latent.probe.held_out import Folds, Labels, check_groups, from_states, from_texts, grouped_folds
from coe.latent.probe.rows import LabelledRow, Wording
from coe.latent.prompts import Prompt, PromptTokens
from coe.latent.states import MOST_TOKENS, PLACES, Place, StateReader, States
from registry.profiles import Measure
from registry.strengths import wilson

DEPTHS: Final = (1 / 2, 2 / 3, 5 / 6, 1.0)
"""Shares of an expert's layers that are read if none are stated."""
MOST_LAYERS: Final = 64
MOST_WORDINGS: Final = 32
MOST_FOLDS: Final = 20
MOST_REPEATS: Final = 20
MOST_FITS: Final = 20_000
"""Regressions: wordings x layers x places x folds x repeats."""
MOST_ANSWER_TOKENS: Final = 32
"""Tokens of the longest right answer that the expert's own one is compared with."""
_MOST_ANSWER: Final = 64 * MOST_ANSWER_TOKENS
"""Characters of an answer that may have so few tokens."""
_ALPHA: Final = 0.05
_MOST_OF_IT: Final = 0.8

Shares = NDArray[np.float64]
"""(n,) share of the repeats in which each row was predicted right."""
Verdict = Literal["readable", "partly readable", "in the text", "not readable"]
OnProgress = Callable[[str, int, int], None]
"""Called with (what is done, units done, units in all)."""


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What is read, and how.

    Attributes:
        layers: counted from 1; 0 is what the head reads; () takes those at DEPTHS.
        places: () takes all that the rows have: `span` if every row states one.
        folds: number of folds. repeats: how often all is repeated with other folds. seed: of the folds.
    """

    layers: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    folds: int = 5
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "folds": (self.folds, 2, MOST_FOLDS),
            "repeats": (self.repeats, 1, MOST_REPEATS),
            "seed": (self.seed, 0, 2**31),
        }
        for name, (value, least, most) in bounds.items():
            if not least <= value <= most:
                raise ConfigError(f"{name} must lie in [{least}, {most}], got {value}")
        if len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"layers: one is listed twice in {', '.join(map(str, self.layers))}")
        if len(self.layers) > MOST_LAYERS:
            raise ConfigError(f"layers: {len(self.layers)} are listed; at most {MOST_LAYERS} are read")
        if unknown := [place for place in self.places if place not in PLACES]:
            raise ConfigError(f"places: there is no {unknown[0]!r}; there are {', '.join(PLACES)}")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of the rows that are right, with Wilson's 95% interval for n groups, which are what is independent."""

    accuracy: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: Shares, n_groups: int) -> Accuracy:
        """Of rows. Repeats share the rows, so they do not narrow the interval."""
        measure = Measure(float(right.mean()) * n_groups, n_groups)
        return cls(measure.accuracy, *wilson(measure), n_groups)


@dataclass(frozen=True, slots=True)
class Cell:
    """What was read at a place of a layer."""

    place: Place
    layer: int
    found: Accuracy


@dataclass(frozen=True, slots=True)
class Mistake:
    """An answer of the expert that is not right.

    Attributes:
        place: file and line of the row. expected: what it should begin with.
        answer: its first tokens, one more than the longest right answer has.
    """

    place: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True)
class WordingReport:
    """One wording of the rows.

    Attributes:
        answer: the expert's own greedy answer; None if the right answers are longer than MOST_ANSWER_TOKENS.
        mistake: its first answer that is not right, if there is one.
        text: what is readable from the text alone.
        cells: all places and layers. best: the one that reads most; of equal ones the deepest.
        verdict: about the best cell.
    """

    wording: str
    answer: Accuracy | None
    mistake: Mistake | None
    text: Accuracy
    cells: tuple[Cell, ...]
    best: Cell
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All wordings of the rows.

    Attributes:
        raw: whether texts were read as they are, without the chat template.
        labels: label -> number of rows. chance, majority: accuracy of guessing, and of the most frequent label.
        best: position of the wording whose best cell reads most.
    """

    expert: str
    raw: bool
    n_layers: int
    n_rows: int
    n_groups: int
    labels: dict[str, int]
    chance: float
    majority: float
    settings: ProbeSettings
    wordings: tuple[WordingReport, ...] = field(repr=False)
    best: int = 0


def default_layers(n_layers: int) -> tuple[int, ...]:
    """The layers at DEPTHS of an expert with so many."""
    return tuple(sorted({max(1, round(depth * n_layers)) for depth in DEPTHS}))


def probe(
    reader: StateReader,
    rows: Sequence[LabelledRow],
    wordings: Sequence[Wording],
    settings: ProbeSettings | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> ProbeReport:
    """Read every wording of the rows at every place and layer.

    Raises:
        TaskError: too few rows of a label, one label only, or a row that cannot fill a wording.
        ConfigError: no wording, or too many. Rejected: a text exceeds the context; no such layer or span.
    """
    if not 1 <= len(wordings) <= MOST_WORDINGS:
        raise ConfigError(f"{len(wordings)} wordings are stated; from 1 to {MOST_WORDINGS} are read")
    labels = [row.label for row in rows]
    asked = settings or ProbeSettings()
    prompts = [[wording.prompt(row) for row in rows] for wording in wordings]
    groups = [row.group or prompt.text for row, prompt in zip(rows, prompts[0], strict=True)]
    check_groups(labels, groups, asked.folds)
    have_spans = all(prompt.span for each in prompts for prompt in each)
    used = ProbeSettings(
        asked.layers or default_layers(reader.n_layers),
        asked.places or tuple(place for place in PLACES if place != "span" or have_spans),
        asked.folds,
        asked.repeats,
        asked.seed,
    )
    _check_work(used, len(wordings))
    n_answer = _answer_tokens(reader, rows)
    encoded = _encoded(reader, prompts, n_answer)
    scorer = _Scorer(rows, groups, used)
    reports = []
    for wording, tokens in zip(wordings, encoded, strict=True):
        shown = None if on_progress is None else _named(on_progress, f"reading {wording.template!r}")
        states = reader.read(tokens, used.layers, used.places, answer_tokens=n_answer, on_progress=shown)
        texts = [one.prompt.text for one in tokens]
        shown = None if on_progress is None else _named(on_progress, f"probing {wording.template!r}")
        reports.append(scorer.report(wording.template, states, texts, has_answers=n_answer > 0, on_progress=shown))
    counts = Counter(labels)
    return ProbeReport(
        expert=reader.spec.name,
        raw=reader.raw,
        n_layers=reader.n_layers,
        n_rows=len(rows),
        n_groups=len(set(groups)),
        labels=dict(sorted(counts.items())),
        chance=1 / len(counts),
        majority=max(counts.values()) / len(rows),
        settings=used,
        wordings=tuple(reports),
        best=max(range(len(reports)), key=lambda i: reports[i].best.found.accuracy),
    )


def _check_work(settings: ProbeSettings, n_wordings: int) -> None:
    n_cells = len(settings.layers) * len(settings.places)
    n_fits = n_wordings * n_cells * settings.folds * settings.repeats
    if n_fits > MOST_FITS:
        raise ConfigError(
            f"{n_wordings} wordings, {n_cells} layers and places, {settings.folds} folds and {settings.repeats} "
            f"repeats are {n_fits:,} regressions, more than {MOST_FITS:,}: use fewer of them"
        )


def _encoded(reader: StateReader, prompts: Sequence[Sequence[Prompt]], answer_tokens: int) -> list[list[PromptTokens]]:
    """The tokens of all wordings, so that the problems of each are known before any is read."""
    encoded: list[list[PromptTokens]] = []
    total = 0
    for each in prompts:
        encoded.append(reader.tokens(each, answer_tokens=answer_tokens))
        total += sum(len(one.ids) for one in encoded[-1])
        if total > MOST_TOKENS:
            raise Rejected(f"the wordings have more than {MOST_TOKENS:,} tokens: read fewer rows (--limit) or wordings")
    return encoded


class _Scorer:
    """Scores the wordings of the same rows, on the same folds."""

    def __init__(self, rows: Sequence[LabelledRow], groups: Sequence[str], settings: ProbeSettings) -> None:
        self._rows = rows
        self._group = np.unique(list(groups), return_inverse=True)[1]
        self._n_groups = int(self._group.max()) + 1
        self._y: Labels = np.unique([row.label for row in rows], return_inverse=True)[1]
        seeds = range(settings.seed, settings.seed + settings.repeats)
        self._folds = [grouped_folds(self._y, groups, settings.folds, seed) for seed in seeds]

    def report(
        self,
        wording: str,
        states: States,
        texts: Sequence[str],
        *,
        has_answers: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> WordingReport:
        """The cells of one wording, and what stands beside them."""
        text = self._mean(lambda folds: from_texts(texts, self._y, folds))
        keys = [(place, layer) for place in states.places for layer in states.layers]
        right: list[Shares] = []
        for done, key in enumerate(keys, 1):
            x = states.at(*key)
            right.append(self._mean(lambda folds, x=x: from_states(x, self._y, folds)))  # type: ignore[misc]
            if on_progress is not None:
                on_progress(done, len(keys))
        best = max(range(len(keys)), key=lambda i: (right[i].mean(), keys[i][1] or np.inf))
        cells = tuple(Cell(*key, Accuracy.of(share, self._n_groups)) for key, share in zip(keys, right, strict=True))
        pairs = zip(states.answers, self._rows, strict=True)
        own = np.array([is_right(answer, row.answer) for answer, row in pairs], np.float64)
        verdict = self._verdict(right[best], text, len(keys))
        answer = Accuracy.of(own, self._n_groups) if has_answers else None
        wrong = zip(self._rows, states.answers, own, strict=True)
        mistakes = (Mistake(row.place, row.answer, said) for row, said, is_one in wrong if not is_one)
        mistake = next(mistakes, None) if has_answers else None
        of_text = Accuracy.of(text, self._n_groups)
        return WordingReport(wording, answer, mistake, of_text, cells, cells[best], verdict)

    def _mean(self, score: Callable[[Folds], NDArray[np.bool_]]) -> Shares:
        shares: Shares = np.mean([score(folds) for folds in self._folds], axis=0, dtype=np.float64)
        return shares

    def _verdict(self, best: Shares, text: Shares, n_cells: int) -> Verdict:
        """By exact tests over groups at 5%, corrected for the number of cells among which the best one was chosen."""
        from scipy.stats import binomtest

        reference, alpha = float(np.bincount(self._y).max() / len(self._y)), _ALPHA / n_cells

        def exceeds(share: float, n: int, by_chance: float, alpha: float) -> bool:
            return n > 0 and bool(binomtest(round(share * n), n, by_chance, alternative="greater").pvalue < alpha)

        if not exceeds(best.mean(), self._n_groups, reference, alpha):
            return "not readable"
        lead = np.bincount(self._group, best - text)
        better, n_apart = int((lead > 0).sum()), int((lead != 0).sum())
        if exceeds(text.mean(), self._n_groups, reference, _ALPHA) and not exceeds(
            better / max(n_apart, 1), n_apart, 0.5, alpha
        ):
            return "in the text"
        return "readable" if (best.mean() - reference) / (1 - reference) >= _MOST_OF_IT else "partly readable"


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer begins with the expected one, as whole words, in upper or lower case."""
    said, wanted = answer.strip().casefold(), expected.casefold()
    rest = said[len(wanted) :]
    return said.startswith(wanted) and not (rest[:1].isalnum() and wanted[-1:].isalnum())


def _answer_tokens(reader: StateReader, rows: Sequence[LabelledRow]) -> int:
    """Tokens of the longest right answer after a space, and one more; 0 if there are too many."""
    if any(len(row.answer) > _MOST_ANSWER for row in rows):
        return 0
    answers = sorted({f" {row.answer}" for row in rows})
    longest = max(map(len, reader.tokenizer(answers, add_special_tokens=False)["input_ids"]))
    return longest + 1 if longest < MOST_ANSWER_TOKENS else 0


def _named(on_progress: OnProgress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(what, done, total)
