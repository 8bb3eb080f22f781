"""Real multiple-choice sets as families; their rows are read from the folder that COE_DATA_DIR names."""

from __future__ import annotations

import json
import os
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from examples.zoo.families import Draw, Family, Row, Split

_LETTERS: Final = "ABCDEFGH"
_ASK: Final = "Answer with the letter of the right option only."
_MOST_CHARACTERS: Final = 1200
"""Longer questions are left out: a step on a CPU would take minutes."""

Read = Callable[[Path], Mapping[Split, Sequence[Row]]]


class NoData(RuntimeError):
    """COE_DATA_DIR is not set, or its folder lacks a set."""


def multiple_choice(question: str, options: Sequence[str], right: int) -> Row:
    """A row whose answer is the letter of the right option."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return Row(f"{question}\n{listed}\n{_ASK}", _LETTERS[right], {"choices": list(options)})


def _family(name: str, about: str, read: Read) -> Family:
    @cache
    def rows(folder: Path) -> Mapping[Split, Sequence[Row]]:
        return {
            split: [row for row in found if len(row.prompt) <= _MOST_CHARACTERS]
            for split, found in read(folder).items()
        }

    def make(draw: Draw) -> Row:
        return draw.rng.choice(rows(_folder())[draw.split])

    return Family(name, about, grader="choice", max_tokens=8, make=make, pools={})


def _folder() -> Path:
    if (folder := os.environ.get("COE_DATA_DIR")) is None:
        raise NoData("set COE_DATA_DIR to the folder that has sets/ (arc_challenge_train.jsonl, medqa_test.jsonl, ...)")
    if not (sets := Path(folder) / "sets").is_dir():
        raise NoData(f"COE_DATA_DIR: {sets} is no folder")
    return sets


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise NoData(f"{file} cannot be read: {error}") from error


def _arc(folder: Path) -> Mapping[Split, Sequence[Row]]:
    files = {Split.TRAIN: "train", Split.VALID: "val", Split.TEST: "test"}
    return {
        split: [
            multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
            for row in _lines(folder / f"arc_challenge_{name}.jsonl")
        ]
        for split, name in files.items()
    }


def _medqa(folder: Path) -> Mapping[Split, Sequence[Row]]:
    rows = _lines(folder / "medqa_test.jsonl")
    return _dealt(
        multiple_choice(row["question"], list(row["options"].values()), list(row["options"]).index(row["answer"]))
        for row in rows
    )


def _obqa(folder: Path) -> Mapping[Split, Sequence[Row]]:
    rows = [row for row in _lines(folder / "mmlu_csqa_obqa_llmrouter.jsonl") if row["task_name"] == "openbook_qa"]
    choices = [literal_eval(row["choices"]) for row in rows]
    return _dealt(
        multiple_choice(row["query"], of["text"], of["label"].index(row["ground_truth"]))
        for row, of in zip(rows, choices, strict=True)
    )


def _dealt(rows: Iterable[Row]) -> Mapping[Split, Sequence[Row]]:
    """A set without splits of its own: three fifths to train on, one to validate, one to test."""
    mixed = list(rows)
    Random("real sets").shuffle(mixed)
    first, second = 3 * len(mixed) // 5, 4 * len(mixed) // 5
    return {Split.TRAIN: mixed[:first], Split.VALID: mixed[first:second], Split.TEST: mixed[second:]}


REAL_SETS: Final = {
    "arc_challenge": _family("arc_challenge", "grade-school science questions, to the letter of an option", _arc),
    "medqa": _family("medqa", "questions of a medical examination, to the letter of an option", _medqa),
    "obqa": _family("obqa", "questions of elementary science, to the letter of an option", _obqa),
}
