import pytest

from registry.spelling import MOST_CHARACTERS, MOST_KNOWN, close_matches, did_you_mean, mistyped, question

KNOWN = ("category", "knn", "cluster")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("categry", {}, "; did you mean 'category'?"),
        ("categry", {"listed": True}, "; did you mean 'category'? there are: category, knn, cluster"),
        ("xyz", {}, ""),
        ("xyz", {"listed": True}, "; there are: category, knn, cluster"),
    ],
)
def test_the_end_of_a_message(name, options, expected):
    assert did_you_mean(name, KNOWN, **options) == expected


def test_several_suggestions_and_an_empty_list():
    assert question("rouge", ["rouge1", "rouge2", "blue"], most=2) == "did you mean 'rouge2' or 'rouge1'?"
    assert close_matches("rouge", ["rouge1", "rouge2", "blue"]) == ("rouge2",)
    assert did_you_mean("x", [], listed=True) == "; there are: none"


def test_long_names_and_many_known_ones_are_bounded():
    assert close_matches("k" * MOST_CHARACTERS, ["k" * MOST_CHARACTERS + "k"]) != ()
    assert close_matches("k" * (MOST_CHARACTERS + 1), ["k" * MOST_CHARACTERS]) == ()
    many = [f"expert-{i:05}" for i in range(20_000)]
    assert close_matches("expert-12345x", many) == ("expert-12345",)
    assert close_matches("expert-00000x", many) == ("expert-00000",)
    assert close_matches("zexpert-19999", many) == ("expert-19999",)
    assert len(many) > MOST_KNOWN


def test_a_mistyped_name_is_found_among_what_is_there():
    assert mistyped(["answer"], ["note", "anwser"]) == "; 'anwser': did you mean 'answer'?"
    assert mistyped(["answer"], ["note", "x" * 10_000]) == ""
    assert mistyped(["answer"], (f"{i}" for i in range(10**9))) == ""
