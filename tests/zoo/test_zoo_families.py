"""The generators: the same seed gives the same rows, splits share nothing, correct answers are graded as correct."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from coe.evaluation.graders import GRADERS
from examples.zoo.families import FAMILIES, Draw, Family, Pool, Row, Split
from examples.zoo.families.base import lines, phrases, words
from examples.zoo.scoring import grades

N = 120
NUMBERS_SHARED = ("wholes", Split.FRESH)  # a closed class, used up by the other splits
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_there_are_at_least_six_families_under_their_own_names() -> None:
    assert len(FAMILIES) >= 6
    assert all(name == family.name for name, family in FAMILIES.items())


@every_family
def test_rows_depend_on_the_seed_alone(family: Family) -> None:
    assert family.rows(Split.TEST, N, seed=1) == family.rows(Split.TEST, N, seed=1)
    assert family.rows(Split.TEST, N, seed=1) != family.rows(Split.TEST, N, seed=2)


@every_family
def test_splits_share_no_template_no_word_and_no_prompt(family: Family) -> None:
    for name, pool in family.pools.items():
        for one, other in combinations(Split, 2):
            if (name, other) != NUMBERS_SHARED:
                assert not set(pool.of(one)) & set(pool.of(other)), (name, one, other)
        assert {*pool, *pool.fresh} == {item for split in Split for item in pool.of(split)}
        assert all(pool.of(split) for split in Split), name
    prompts = {split: {row.prompt for row in family.rows(split, N, seed=3)} for split in Split}
    assert all(len(found) == N for found in prompts.values())
    for one, other in combinations(Split, 2):
        assert not prompts[one] & prompts[other]


@every_family
def test_fresh_pools_have_several_different_items_of_the_same_kind(family: Family) -> None:
    for name, pool in family.pools.items():
        assert len(set(pool.fresh)) == len(pool.fresh) >= (4 if any("{" in item for item in pool) else 5), name
        needed = set.intersection(*(set(re.findall(r"{\w+}", item)) for item in pool))
        assert all(needed <= set(re.findall(r"{\w+}", item)) for item in pool.fresh), name


@every_family
@pytest.mark.parametrize("split", Split)
def test_prompts_do_not_name_their_family_and_are_filled_in(family: Family, split: Split) -> None:
    for row in family.rows(split, N, seed=4):
        assert not re.search(rf"\b{family.name}\b", row.prompt, re.IGNORECASE)
        assert not re.search(r"[{}]|  |\\", row.prompt)
        assert row.prompt == row.prompt.strip()


@every_family
@pytest.mark.parametrize("split", Split)
def test_the_right_answer_is_graded_right_and_another_rows_wrong(family: Family, split: Split) -> None:
    rows = family.rows(split, N, seed=5)
    assert grades(family, rows, [row.answer for row in rows]) == [1.0] * N
    assert grades(family, rows, [row.target for row in rows]) == [1.0] * N
    assert sum(grades(family, rows, [row.answer for row in rows[1:] + rows[:1]])) < 0.7 * N
    assert sum(grades(family, rows, ["I am a helpful assistant."] * N)) == 0


def test_no_family_is_answered_right_by_the_answers_of_another() -> None:
    for family, other in combinations(FAMILIES.values(), 2):
        ours, theirs = family.rows(Split.TEST, 40, seed=6), other.rows(Split.TEST, 40, seed=6)
        assert sum(grades(family, ours, [row.target for row in theirs])) <= 1
        assert sum(grades(other, theirs, [row.target for row in ours])) <= 1


def test_a_wrong_query_returns_other_rows() -> None:
    """The random tables tell the query kinds apart: a constant answer or a dropped condition does not pass."""
    family = FAMILIES["sql"]
    rows = [row for row in family.rows(Split.TEST, N, seed=7) if " WHERE " in row.answer]
    unconditional = [row.answer.partition(" WHERE ")[0] for row in rows]
    assert sum(grades(family, rows, unconditional)) <= 0.05 * len(rows)


def test_pools_are_dealt_three_to_one_to_one() -> None:
    pool = Pool("abcdefghij", fresh="xy")
    assert [pool.of(split) for split in Split] == [tuple("abcfgh"), tuple("di"), tuple("ej"), tuple("xy")]
    assert words(" a b\n c ") == ("a", "b", "c")
    assert lines("\n  one line\n\n  another ") == ("one line", "another")
    assert phrases("bag of rice;\n  coat") == ("bag of rice", "coat")


def test_fresh_items_of_a_pool_follow_a_mark() -> None:
    for pool in (words("a b\n---\nc d"), lines("a\nb\n---\nc\nd\n"), phrases("a; b\n---\nc; d")):
        assert (pool, pool.fresh) == (("a", "b"), ("c", "d"))
    assert words("a b").of(Split.FRESH) == ()


def test_a_family_without_enough_prompts_says_so() -> None:
    def make(draw: Draw) -> Row:
        return Row(draw.pick(words("a b c d e")), "x")

    family = Family("tiny", "", "exact", 4, make, {})
    assert len(family.rows(Split.TRAIN, 3, seed=0)) == 3
    with pytest.raises(ValueError, match="too few different train prompts for 4 rows"):
        family.rows(Split.TRAIN, 4, seed=0)


@every_family
def test_the_grader_exists(family: Family) -> None:
    assert family.grader in GRADERS
    assert family.max_tokens <= 32
