"""OptionPrior: the probability of each option of a multiple-choice question, before any expert answers.

Votes of experts are evidence; Bayes' rule combines them with a prior. Options are written by people or models with
habits: length, punctuation, which of several numbers is right. A prior learned from questions with known answers breaks
ties and settles close votes. It does not know the subject, and the habits are those of its training source: train it on
questions of the kind that it will see, or do not use it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from registry.json_text import loads
from routers.errors import InvalidArtifact, InvalidOutcomes, RouterError
from routers.outcomes.table import OutcomeTable

FORMAT: Final = "coe-option-prior/1"
FEATURES: Final = (
    "length_rank",  # of the option among the question's, -0.5 to 0.5
    "length",  # in standard deviations from the question's mean
    "likeness",  # mean trigram overlap (Jaccard) with the other options, from the question's mean
    "nearest",  # trigram overlap with the most similar other option
    "in_question",  # share of its words that the question has
    "full_stop",
    "all_of_them",  # "all of the above", "both ..."
    "none_of_them",
    "number_rank",  # this and the following: only if the options are numbers
    "number_extreme",  # distance from the middle rank
    "number_length_rank",
)
_OPTION: Final = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+", re.MULTILINE)
_NUMBER: Final = re.compile(r"-?\d[\d,]*\.?\d*(?:[eE]-?\d+)?")
_CACHED: Final = 16_384
_ARE_NUMBERS: Final = 0.8
"""Options count as numbers if more than this share of them begin with one."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OptionPrior:
    """P(option | question) proportional to exp(weights . features of the option), a conditional logit.

    weights: feature -> weight, for the names in `FEATURES`.
    """

    weights: Mapping[str, float]

    def log_prior(self, prompt: str) -> dict[str, float]:
        """letter -> log probability of each option that the prompt lists; empty without options."""
        letters, features = options_of(prompt)
        if not letters:
            return {}
        scores = features @ np.array([self.weights[name] for name in FEATURES])
        scores -= scores.max()
        return dict(zip(letters, (scores - math.log(np.exp(scores).sum())).tolist(), strict=True))

    @classmethod
    def fit(cls, table: OutcomeTable, *, column: str = "answer", regularisation: float = 1e-3) -> Self:
        """Learn from n questions whose options are listed in the prompt and whose correct letter is in a column.

        Rows whose prompt does not list the correct letter are skipped. The log-likelihood is concave: there is one
        optimum, and no seed.

        Args:
            regularisation: L2 penalty on the weights, per question.

        Raises:
            InvalidOutcomes: no such column, or no row with options and an answer among them.
        """
        questions = []
        for prompt, right in zip(table.prompts, table.labels(column), strict=True):
            letters, features = options_of(prompt)
            if right in letters and len(letters) > 1:
                questions.append((features, letters.index(right)))
        if not questions:
            raise InvalidOutcomes(
                f"no prompt lists options ('A. ...', 'B. ...') with the letter of column {column!r} among them"
            )
        return cls(dict(zip(FEATURES, _conditional_logit(questions, regularisation).tolist(), strict=True)))

    def write(self, path: Path | str) -> None:
        """Write it as readable JSON."""
        text = json.dumps({"format": FORMAT, "weights": dict(self.weights)}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The prior in a file from `write`.

        Raises:
            InvalidArtifact: the file is missing, or is not an option prior of this format.
        """
        try:
            document: Any = loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}, not {FORMAT!r}")
            weights = {name: float(document["weights"][name]) for name in FEATURES}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidArtifact(f"{path} is not an option prior that this version reads: {error}") from error
        if not all(map(math.isfinite, weights.values())):
            raise InvalidArtifact(f"{path} has weights that are not finite: train it again")
        return cls(weights)


@lru_cache(maxsize=_CACHED)
def options_of(prompt: str) -> tuple[tuple[str, ...], Floats]:
    """The letters of the k options that a prompt lists last, and their (k, len(FEATURES)) features, read-only.

    Options begin their lines: `A. text`, `B) text` or `(C) text`, in order from A. k is 0 without options.
    """
    starts = _last_list(list(_OPTION.finditer(prompt)))
    if len(starts) < 2:
        return (), np.zeros((0, len(FEATURES)))
    ends = [*(match.start() for match in starts[1:]), len(prompt)]
    texts = [prompt[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)]
    return tuple(match[1] for match in starts), _features(prompt[: starts[0].start()], texts)


def _last_list(matches: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """The last run of A, B, C, ..."""
    run: list[re.Match[str]] = []
    for match in matches:
        if match[1] == "A":
            run = [match]
        elif run and ord(match[1]) == ord(run[-1][1]) + 1:
            run.append(match)
    return run


def _features(question: str, texts: Sequence[str]) -> Floats:
    words, asked = [_words(text) for text in texts], set(_words(question))
    length = np.array([len(text) for text in texts], dtype=np.float64)
    overlap = _overlap([_trigrams(text) for text in texts])
    others = overlap.sum(axis=1) / max(1, len(texts) - 1)
    numbers = np.array([_leading_number(text) for text in texts])
    numeric = float(np.isfinite(numbers).mean() > _ARE_NUMBERS)
    number_rank = numeric * _ranks(np.where(np.isfinite(numbers), numbers, np.inf))
    length_rank = _ranks(length)
    columns = {
        "length_rank": length_rank,
        "length": (length - length.mean()) / (length.std() + 1.0),
        "likeness": others - others.mean(),
        "nearest": overlap.max(axis=1),
        "in_question": [float(np.mean([word in asked for word in own])) if own else 0.0 for own in words],
        "full_stop": [float(text.endswith(".")) for text in texts],
        "all_of_them": [
            float("all of the" in text.lower() or "both" in own) for text, own in zip(texts, words, strict=True)
        ],
        "none_of_them": [float("none of" in text.lower()) for text in texts],
        "number_rank": number_rank,
        "number_extreme": np.abs(number_rank),
        "number_length_rank": numeric * length_rank,
    }
    features = np.column_stack([columns[name] for name in FEATURES])
    features.flags.writeable = False  # cached, and shared by all callers
    return features


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _trigrams(text: str) -> frozenset[str]:
    text = text.lower()
    return frozenset(text[i : i + 3] for i in range(max(1, len(text) - 2)))


def _overlap(grams: Sequence[frozenset[str]]) -> Floats:
    """(k, k) Jaccard similarity of each pair; 0 on the diagonal."""
    overlap = np.zeros((len(grams), len(grams)))
    for i, one in enumerate(grams):
        for j in range(i):
            shared = len(one & grams[j])
            overlap[i, j] = overlap[j, i] = shared / max(1, len(one) + len(grams[j]) - shared)
    return overlap


def _leading_number(text: str) -> float:
    """The first number of a text; NaN without one."""
    match = _NUMBER.search(text)
    return float(match[0].replace(",", "")) if match else math.nan


def _ranks(values: Floats) -> Floats:
    """-0.5 for the smallest to 0.5 for the largest; equal values share the rank of the first."""
    return np.asarray(np.searchsorted(np.sort(values), values) / max(1, len(values) - 1) - 0.5, dtype=np.float64)


def _conditional_logit(questions: Sequence[tuple[Floats, int]], regularisation: float) -> Floats:
    """(len(FEATURES),) weights of the highest penalised likelihood."""
    from scipy.optimize import minimize

    x = np.concatenate([features for features, _ in questions])
    counts = np.array([len(features) for features, _ in questions])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    right = starts + np.array([index for _, index in questions])

    def loss(weights: Floats) -> tuple[float, Floats]:
        scores = x @ weights
        exps = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), counts))
        p = exps / np.repeat(np.add.reduceat(exps, starts), counts)
        gradient = (x.T @ p - x[right].sum(axis=0)) / len(counts) + 2 * regularisation * weights
        return float(-np.log(p[right]).mean() + regularisation * weights @ weights), gradient

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    if not np.isfinite(found.x).all():
        raise RouterError(f"the option prior cannot be fitted: {found.message}")
    return np.asarray(found.x, dtype=np.float64)
