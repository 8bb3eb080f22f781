import math

import pytest

from routers.conversation.dependence import COMPLETE, EMPTY, MOST_CHARACTERS, log_odds
from routers.conversation.training import errors, examples, phrasings, train


@pytest.mark.parametrize(
    "text", ["and 3 litres?", "yes, do that", "same in JSON", "und die anderen?", "¿y el otro?", "why?"]
)
def test_a_turn_that_needs_the_one_before_it(text: str) -> None:
    assert log_odds(text) > 0


@pytest.mark.parametrize(
    "text",
    [
        "How many litres of paint do I need for a wall of 12 square metres?",
        "Write a letter to the city council about the broken street light.",
        "Wie hoch ist der Eiffelturm in Paris?",
    ],
)
def test_a_turn_that_stands_alone(text: str) -> None:
    assert log_odds(text) < 0


def test_long_turns_stand_alone_and_turns_without_a_word_do_not() -> None:
    assert log_odds("and " * MOST_CHARACTERS) == COMPLETE < 0
    assert [log_odds(text) for text in ("", "?", "  ...", "👍")] == [EMPTY] * 4


def test_the_case_and_the_numbers_of_a_turn_do_not_matter() -> None:
    assert log_odds("AND THE ONES OVER 90?") == log_odds("and  the ones over 7.5?")


def test_the_classifier_finds_held_out_phrasings_of_every_language() -> None:
    found = errors()
    assert len(found) == 10
    follow_ups, complete = zip(*found.values(), strict=True)
    assert min(follow_ups) >= 0.8 and sum(follow_ups) / 10 >= 0.95
    assert min(complete) >= 0.5 and sum(complete) / 10 >= 0.9


def test_no_held_out_phrasing_is_trained_on() -> None:
    trained = set(examples()[0])
    for language in phrasings().values():
        assert trained.isdisjoint([*language["held_out_follow_ups"], *language["held_out_complete"]])


def test_training_gives_the_shipped_weights() -> None:
    from safetensors.numpy import load_file

    from routers.conversation.dependence import WEIGHTS

    shipped, again = load_file(WEIGHTS), train()
    assert abs(shipped["weights"] - again["weights"]).max() < 0.02
    assert math.isclose(shipped["bias"][0], again["bias"][0], abs_tol=0.02)
