"""Refusals and "I don't know": held-out phrasings of ten languages, false alarms, and the shipped weights."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from coe.answers.refusal_training import errors, filled, phrasings, train
from coe.answers.refusals import CLASSES, MAX_CHARS, N_FEATURES, WEIGHTS, refuses

ZOO = Path("examples/zoo/outcomes.parquet")


@pytest.mark.parametrize("language", sorted(phrasings()))
def test_held_out_phrasings(language: str) -> None:
    recall, alarms = errors()[language]
    assert recall >= 0.85 and alarms <= 0.06
    templates = phrasings()[language]
    assert not set(templates["held_out"]) & set(templates["refusals"])
    assert not set(templates["right"]) & set(templates["answers"])


def test_false_alarms_on_all_held_out_answers() -> None:
    right = [text for language in phrasings().values() for text in filled(language, "right")]
    assert np.mean([refuses(text) for text in right]) <= 0.005 + 1 / len(right)


@pytest.mark.parametrize(
    "text",
    [
        "I don't know",
        "I DON'T KNOW.",
        "I\u2019m sorry, I can\u2019t help with that.",
        "**I don't know.**",
        "idk",
        "I'm sorry, I cannot assist with that request. It may be illegal. Is there anything else I can help you with?",
        "I don't know the capital of France.",
        "I am unable to answer the question based on the provided context.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "42",
        "No.",
        "Paris",
        "Unknown",
        "wind",
        "None of the above",
        "Cannot be determined",
        "Not enough information",
        "I don't know, but I think it's Paris.",
        "I don't know. Maybe Paris?",
        "I'm not sure, but probably B.",
        "I cannot answer. The answer is B.",
        "I don't know the proof, but the result is \\boxed{7}.",
        "The translation is: I don't know.",
        "He doesn't know.",
        "A penguin cannot fly.",
        "I can't recommend this product enough!",
        "SELECT name FROM t -- I don't know",
        "raise ValueError('I cannot read this')",
        "Ich weiß es nicht genau, aber ich glaube Paris.",
        "我不确定，但我认为是巴黎。",
        "I don't know. " * (MAX_CHARS // 14 + 1),
    ],
)
def test_answers(text: str) -> None:
    assert not refuses(text)


def test_the_shipped_weights_are_those_of_the_phrasings() -> None:
    from safetensors.numpy import load_file

    shipped, made = load_file(WEIGHTS), train()
    assert shipped["weights"].shape == (N_FEATURES, len(CLASSES))
    for name, array in made.items():
        np.testing.assert_allclose(shipped[name], array, atol=0.05)


def test_false_alarms_on_the_recorded_right_answers_of_the_zoo() -> None:
    assert alarms(ZOO) == 0


@pytest.mark.skipif("COE_DATA_DIR" not in os.environ, reason="COE_DATA_DIR names no folder of recorded data")
def test_false_alarms_on_recorded_solutions() -> None:
    import json

    sets = Path(os.environ["COE_DATA_DIR"]) / "sets"
    found = []
    for name, field in (("gsm8k_test", "answer"), ("gsm8k_train_2000", "answer"), ("humaneval", "canonical_solution")):
        lines = (sets / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found += [refuses(str(json.loads(line)[field])) for line in lines]
    assert np.mean(found) <= 0.005


def alarms(path: Path) -> float:
    """The share of right answers of a table that count as refusals."""
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(path)
    assert table.answers
    right = [
        text
        for column, name in enumerate(table.experts)
        for text, score in zip(table.answers[name], table.scores[:, column], strict=True)
        if score >= 1
    ]
    assert len(right) > 100
    return float(np.mean([refuses(text) for text in right]))


def test_a_text_takes_little_time() -> None:
    texts = [f"The {n}th answer does not depend on x, since no term of it has one." for n in range(1_000)]
    started = time.monotonic()
    assert not any(map(refuses, texts))
    assert time.monotonic() - started < 5
