"""The prior of options: its features of a question, learning a planted pattern, and saving and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coe.compose.option_prior import FEATURES, FORMAT, OptionPrior, options_of
from routers.errors import InvalidArtifact, InvalidOutcomes
from routers.outcomes.table import OutcomeTable

QUESTION = "How long is the river Spree?\nA. 400 km\nB. 182 km\nC. 90 km\nD. 1,204 km"


def feature(prompt: str, name: str) -> list[float]:
    return options_of(prompt)[1][:, FEATURES.index(name)].tolist()


def test_options_are_the_last_list_that_begins_with_a() -> None:
    assert options_of(QUESTION)[0] == ("A", "B", "C", "D")
    assert options_of("Compare\nA. one\nB. two\n\nWhich?\n(A) both\n(B) none\n(C) the first")[0] == ("A", "B", "C")
    assert options_of("A) yes\nB) no, because\nit is long\nC: perhaps")[0] == ("A", "B", "C")
    for prompt in ("", "no options", "A. only one", "B. second\nC. third", "E. coli\nA. niger"):
        letters, features = options_of(prompt)
        assert letters == () and features.shape == (0, len(FEATURES))


def test_the_features_of_numbers_by_hand() -> None:
    assert feature(QUESTION, "number_rank") == pytest.approx([1 / 6, -1 / 6, -0.5, 0.5])
    assert feature(QUESTION, "number_extreme") == pytest.approx([1 / 6, 1 / 6, 0.5, 0.5])
    words = "Who?\nA. Anna.\nB. Ben 1\nC. both\nD. none of them"
    assert feature(words, "number_rank") == [0] * 4
    assert feature(words, "full_stop") == [1, 0, 0, 0]
    assert feature(words, "all_of_them") == [0, 0, 1, 0] and feature(words, "none_of_them") == [0, 0, 0, 1]
    assert feature(words, "length_rank") == pytest.approx([-1 / 6, -1 / 6, -0.5, 0.5])


def test_features_of_texts_by_hand() -> None:
    prompt = "Is the cat red?\nA. the cat\nB. abcd\nC. abce"
    assert feature(prompt, "in_question") == [1, 0, 0]
    assert feature(prompt, "nearest") == pytest.approx([0, 1 / 3, 1 / 3])  # {abc, bcd} and {abc, bce}
    assert feature(prompt, "likeness") == pytest.approx([-1 / 9, 1 / 18, 1 / 18])


def planted(n: int = 300, seed: int = 0) -> OutcomeTable:
    """The right option ends with a full stop, nine times of ten; its length and place mean nothing."""
    rng = np.random.default_rng(seed)
    prompts, right = [], []
    for i in range(n):
        answer, stop = rng.integers(4, size=2)
        marked = answer if rng.random() < 0.9 else stop
        texts = ["x" * rng.integers(3, 9) + ("." if j == marked else "") for j in range(4)]
        prompts.append(
            f"question {i}\n" + "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True))
        )
        right.append("ABCD"[answer])
    return OutcomeTable(
        tuple(map(str, range(n))), tuple(prompts), ("a",), np.zeros((n, 1)), frame=pd.DataFrame({"answer": right})
    )


def test_a_planted_habit_is_learned_with_its_probability() -> None:
    prior = OptionPrior.fit(planted(), regularisation=1e-6)
    found = prior.log_prior("?\nA. xxxxx\nB. xxxxxx.\nC. xxxx\nD. xxxxx")
    assert sum(math.exp(value) for value in found.values()) == pytest.approx(1)
    assert math.exp(found["B"]) == pytest.approx(0.925, abs=0.03)  # 0.9 + 0.1 / 4
    assert prior.log_prior("nothing listed") == {}
    assert OptionPrior.fit(planted()) == OptionPrior.fit(planted())


def test_rows_without_their_answer_among_the_options_are_left_out() -> None:
    table = planted(40)
    with pytest.raises(InvalidOutcomes, match="no prompt lists options"):
        OptionPrior.fit(
            OutcomeTable(("1",), ("no options",), ("a",), np.zeros((1, 1)), frame=pd.DataFrame({"answer": ["A"]}))
        )
    with pytest.raises(InvalidOutcomes, match="no column 'letter'"):
        OptionPrior.fit(table, column="letter")


def test_a_prior_comes_back_from_its_file(tmp_path: Path) -> None:
    prior, path = OptionPrior.fit(planted(60)), tmp_path / "prior.json"
    prior.write(path)
    assert OptionPrior.read(path) == prior


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        (json.dumps({"format": "other/1"}), "its format is 'other/1'"),
        (json.dumps({"format": FORMAT, "weights": {}}), "length_rank"),
        (json.dumps({"format": FORMAT, "weights": dict.fromkeys(FEATURES, math.nan)}), "not finite"),
    ],
)
def test_files_that_are_no_prior_are_named(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "prior.json"
    path.write_text(content)
    with pytest.raises(InvalidArtifact, match=why) as error:
        OptionPrior.read(path)
    assert str(path) in str(error.value)
