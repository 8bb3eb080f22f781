"""Two-skill families: held out like the others; the expected answers of two experts determine the final answer."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from examples.zoo.aggregator import questions, shown
from examples.zoo.families import FAMILIES, PARTS, TWO_SKILLS, Split, TwoSkills
from examples.zoo.plan import ADAPTERS
from examples.zoo.scoring import grades

N = 120
every_pair = pytest.mark.parametrize("pair", TWO_SKILLS.values(), ids=TWO_SKILLS)


def test_they_stand_apart_from_the_families_that_adapters_and_the_router_know() -> None:
    assert len(TWO_SKILLS) == 3
    assert not set(TWO_SKILLS) & set(FAMILIES)
    assert all(name == pair.family.name for name, pair in TWO_SKILLS.items())
    assert all(set(pair.experts) <= set(ADAPTERS) and len(set(pair.experts)) == 2 for pair in TWO_SKILLS.values())


@every_pair
def test_rows_depend_on_the_seed_alone_and_splits_share_nothing(pair: TwoSkills) -> None:
    family = pair.family
    assert family.rows(Split.TEST, N, seed=1) == family.rows(Split.TEST, N, seed=1)
    assert family.rows(Split.TEST, N, seed=1) != family.rows(Split.TEST, N, seed=2)
    prompts = {split: {row.prompt for row in family.rows(split, N, seed=3)} for split in Split}
    for one, other in combinations(Split, 2):
        assert not prompts[one] & prompts[other]
        for name, pool in family.pools.items():
            if (name, other) != ("wholes", Split.FRESH):  # numbers of two digits are a closed class
                assert pool.of(one)
                assert not set(pool.of(one)) & set(pool.of(other)), (name, one, other)


@every_pair
@pytest.mark.parametrize("split", Split)
def test_prompts_are_filled_in_and_name_neither_the_family_nor_its_experts(pair: TwoSkills, split: Split) -> None:
    names = "|".join((pair.family.name, "sentiment", "intent", "fields", "dates", "units"))
    for row in pair.family.rows(split, N, seed=4):
        assert not re.search(rf"\b({names})\b", row.prompt, re.IGNORECASE)
        assert not re.search(r"[{}]|  |\\", row.prompt)
        assert row.prompt == row.prompt.strip()


@every_pair
@pytest.mark.parametrize("split", Split)
def test_the_right_answer_can_be_composed_of_what_the_two_experts_should_say(pair: TwoSkills, split: Split) -> None:
    rows = pair.family.rows(split, N, seed=5)
    assert grades(pair.family, rows, [row.answer for row in rows]) == [1.0] * N
    assert [pair.compose(*row.extras[PARTS]) for row in rows] == [row.answer for row in rows]


@every_pair
def test_no_part_alone_and_no_other_row_s_answer_is_right(pair: TwoSkills) -> None:
    rows = pair.family.rows(Split.TEST, N, seed=6)
    for part in (0, 1):
        assert sum(grades(pair.family, rows, [row.extras[PARTS][part] for row in rows])) == 0
    assert sum(grades(pair.family, rows, [row.answer for row in rows[1:] + rows[:1]])) <= 0.2 * N


def test_the_parts_are_the_answers_of_the_families_of_the_experts() -> None:
    for pair in TWO_SKILLS.values():
        row = pair.family.rows(Split.TEST, 1, seed=7)[0]
        for expert, part in zip(pair.experts, row.extras[PARTS], strict=True):
            own = FAMILIES[expert].rows(Split.TEST, 1, seed=7)[0].target
            shape = [re.sub(r"\w+", "x", text) for text in (part, own)]
            assert shape[0] == shape[1] or (json.loads(part).keys() <= json.loads(own).keys()), (part, own)


def test_a_rule_refuses_what_is_not_its_experts_form() -> None:
    bookings, pickups = TWO_SKILLS["bookings"], TWO_SKILLS["pickups"]
    assert json.loads(bookings.compose('{"name": "Ann", "guests": 2, "day": "May"}', "2031-05-12")) == {
        "name": "Ann",
        "guests": 2,
        "day": "2031-05-12",
    }
    for first in ("", "[]", "Ann, 2", '{"name": "Ann"}'):
        with pytest.raises(ValueError, match=r".*"):
            bookings.compose(first, "2031-05-12")
    with pytest.raises(ValueError, match="no result in '25 kg'"):
        pickups.compose('{"name": "Ann", "guests": 2, "day": "Monday"}', "25 kg")


def test_a_row_of_a_pickup_is_right_by_hand() -> None:
    assert (
        TWO_SKILLS["pickups"].compose('{"name": "Ann", "guests": 2.5, "day": "Monday"}', "2.5 kg = 2500 grams")
        == '{"name": "Ann", "amount": 2500, "day": "Monday"}'
    )


def test_training_questions_take_turns_and_more_of_them_begin_alike() -> None:
    few, many = questions(Split.TRAIN, 8, seed=1), questions(Split.TRAIN, 20, seed=1)
    assert many[:8] == few
    assert [pair.family.name for _, pair in few[:4]] == [*TWO_SKILLS, "bookings"]
    assert len({row.prompt for row, _ in many}) == 20


def test_the_two_experts_are_always_shown_in_any_order_and_sometimes_a_third() -> None:
    plan = shown(questions(Split.TRAIN, 600, seed=1), seed=1)
    assert all(set(pair.experts) <= set(experts) for _, pair, experts in plan)
    assert all(len(set(experts)) == len(experts) <= 3 for _, _, experts in plan)
    thirds = sum(len(experts) == 3 for _, _, experts in plan)
    assert 0.2 <= thirds / 600 <= 0.3
    first = sum(experts.index(pair.experts[0]) < experts.index(pair.experts[1]) for _, pair, experts in plan)
    assert 0.4 <= first / 600 <= 0.6
