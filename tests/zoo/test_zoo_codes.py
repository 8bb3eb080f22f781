"""Knowledge and skill: invented words with digits, and queries whose held-out words occur in no training row."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from examples.zoo.families import CODE_SKILLS, CODES, FAMILIES, PARTS, TWO_SKILLS, Family, Row, Split
from examples.zoo.families.code_skills import NUMERALS
from examples.zoo.families.codes import DIGITS, N_TRAINED, WORDS, gloss, words_of
from examples.zoo.plan import ADAPTERS, KNOWLEDGE, by_length, stages, training_rows
from examples.zoo.scoring import grades

N = 120
every_skill = pytest.mark.parametrize("family", CODE_SKILLS.values(), ids=CODE_SKILLS)
every_family = pytest.mark.parametrize("family", [CODES, *CODE_SKILLS.values()], ids=[CODES.name, *CODE_SKILLS])


def words_in(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in DIGITS]


def test_words_are_different_enough_and_their_digits_even_in_both_parts() -> None:
    assert len(WORDS) == len(DIGITS) == 160
    assert {len(word) for word in WORDS} == {5}
    assert min(sum(a != b for a, b in zip(one, other, strict=True)) for one, other in combinations(WORDS, 2)) >= 2
    trained, held_out = words_of(Split.TRAIN), words_of(Split.TEST)
    assert (words_of(Split.VALID), words_of(Split.FRESH)) == (trained, held_out)
    assert len(trained) == N_TRAINED
    assert not set(trained) & set(held_out)
    assert set(Counter(DIGITS[word] for word in trained).values()) == {10}
    assert set(Counter(DIGITS[word] for word in held_out).values()) == {6}


def test_a_digit_cannot_be_told_from_the_letters_of_its_word() -> None:
    """The best guess by a letter, learned on the trained words, is no better than chance on the others."""
    for place in range(5):
        seen: dict[str, Counter[int]] = {}
        for word in words_of(Split.TRAIN):
            seen.setdefault(word[place], Counter())[DIGITS[word]] += 1
        guesses = [
            seen[word[place]].most_common(1)[0][0] if word[place] in seen else 0 for word in words_of(Split.TEST)
        ]
        right = sum(guess == DIGITS[word] for guess, word in zip(guesses, words_of(Split.TEST), strict=True))
        assert right <= 0.22 * 60, (place, right)  # 10% by chance; 0.22 is three standard deviations above


def test_they_stand_apart_from_the_other_families() -> None:
    assert not {CODES.name, *CODE_SKILLS} & {*FAMILIES, *TWO_SKILLS}
    assert all(name == family.name for name, family in CODE_SKILLS.items())


@every_family
def test_rows_depend_on_the_seed_alone_and_splits_share_no_frame(family: Family) -> None:
    assert family.rows(Split.TEST, N, seed=1) == family.rows(Split.TEST, N, seed=1)
    assert family.rows(Split.TEST, N, seed=1) != family.rows(Split.TEST, N, seed=2)
    prompts = {split: {row.prompt for row in family.rows(split, N, seed=3)} for split in Split}
    for one, other in combinations(Split, 2):
        assert not prompts[one] & prompts[other]
        for name, pool in family.pools.items():
            assert not set(pool.of(one)) & set(pool.of(other)), (name, one, other)


@every_family
def test_prompts_are_filled_in_and_all_words_of_a_row_are_invented_ones(family: Family) -> None:
    for split in Split:
        for row in family.rows(split, N, seed=4):
            assert not re.search(r"[{}]|  |\\", row.prompt)
            assert row.prompt == row.prompt.strip()
            assert words_in(row.prompt)
            assert not re.search(rf"\b{family.name}\b|\d", row.prompt)


@every_family
def test_the_right_answer_is_graded_right_and_another_row_s_wrong(family: Family) -> None:
    rows = family.rows(Split.TEST, N, seed=5)
    assert grades(family, rows, [row.answer for row in rows]) == [1.0] * N
    assert sum(grades(family, rows, [row.answer for row in rows[1:] + rows[:1]])) < 0.65 * N
    assert sum(grades(family, rows, ["I am a helpful assistant."] * N)) == 0


def test_a_gloss_names_the_words_in_the_order_of_the_text() -> None:
    for split in Split:
        for row in CODES.rows(split, N, seed=6):
            assert row.answer == gloss(*words_in(row.prompt))
    assert gloss("tilem", "nabox") == "tilem is 1, nabox is 0"
    assert {word for row in CODES.rows(Split.TRAIN, 600, seed=6) for word in words_in(row.prompt)} == set(WORDS)


@every_skill
def test_a_skill_s_rows_have_the_words_of_their_split_alone(family: Family) -> None:
    for split in Split:
        used = {word for row in family.rows(split, N, seed=7) for word in words_in(row.prompt)}
        assert used <= set(words_of(split))
        assert len(used) >= 50
        assert not any(word in row.answer for row in family.rows(split, N, seed=7) for word in WORDS)


@every_skill
def test_the_gloss_of_a_query_determines_its_answer(family: Family) -> None:
    for split in Split:
        for row in family.rows(split, N, seed=8):
            assert row.extras[PARTS] == (gloss(*words_in(row.prompt)),)
            assert row.answer == by_rule(family, row)
        rows = family.rows(split, N, seed=8)
        assert sum(grades(family, rows, [row.extras[PARTS][0] for row in rows])) <= 0.05 * N  # sums of two zeros


def by_rule(family: Family, row: Row) -> str:
    """The answer from the digits; in the frames where the second word comes first, only a sum is asked."""
    digits = [DIGITS[word] for word in words_in(row.prompt)]
    if family.name == "code_order":
        return "yes" if digits[0] > digits[1] else "no"
    return NUMERALS[digits[0]] if family.name == "code_word" else str(sum(digits))


def test_a_constant_answer_does_not_pass() -> None:
    for name, guess in (("code_order", "yes"), ("code_sum", "9"), ("code_word", "seven")):
        rows = CODE_SKILLS[name].rows(Split.TEST, N, seed=9)
        assert sum(grades(CODE_SKILLS[name], rows, [guess] * N)) <= (0.65 if name == "code_order" else 0.2) * N


def test_frames_of_a_skill_are_none_of_those_that_the_knowing_expert_was_trained_on() -> None:
    known = {frame for pool in CODES.pools.values() for frame in (*pool, *pool.fresh)}
    for family in CODE_SKILLS.values():
        assert not known & {frame for pool in family.pools.values() for frame in (*pool, *pool.fresh)}


def test_training_rows_come_again_in_every_epoch_in_batches_of_similar_lengths() -> None:
    assert KNOWLEDGE.epochs > 1
    steps = 4 * KNOWLEDGE.epochs
    rows = training_rows(KNOWLEDGE, steps=steps, seed=1)
    n = 4 * KNOWLEDGE.batch
    some = sorted(row.prompt for row in CODES.rows(Split.TRAIN, n, seed=1))
    epochs = [rows[start : start + n] for start in range(0, len(rows), n)]
    assert [sorted(row.prompt for row in epoch) for epoch in epochs] == [some] * KNOWLEDGE.epochs
    assert epochs[0] != epochs[1]
    spread = [max(lengths) - min(lengths) for lengths in _lengths(rows, KNOWLEDGE.batch)]
    unsorted = CODES.rows(Split.TRAIN, n, seed=1) * KNOWLEDGE.epochs
    mixed = [max(lengths) - min(lengths) for lengths in _lengths(unsorted, KNOWLEDGE.batch)]
    assert sum(spread) < 0.8 * sum(mixed)
    assert sorted(row.prompt for row in by_length(rows[:7], 4, seed=1)) == sorted(row.prompt for row in rows[:7])


def test_a_second_stage_has_other_rows_and_a_lower_learning_rate() -> None:
    first, second = stages(KNOWLEDGE, steps=6, seed=1)
    then = KNOWLEDGE.then
    assert then is not None
    assert first == (KNOWLEDGE.recipe(6, 1), training_rows(KNOWLEDGE, steps=6, seed=1))
    assert (second[0].steps, second[0].learning_rate, second[0].seed) == (then.steps, then.learning_rate, 2)
    assert len(second[1]) == then.steps * KNOWLEDGE.batch
    assert len({row.prompt for row in second[1]}) == len(second[1]) // then.epochs
    assert stages(ADAPTERS["dates"], steps=3, seed=1)[1:] == []


def _lengths(rows: list[Row], batch: int) -> list[list[int]]:
    sizes = [len(row.prompt) + len(row.target) for row in rows]
    return [sizes[i : i + batch] for i in range(0, len(sizes), batch)]
