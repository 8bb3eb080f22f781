import time

import pytest

from routers.conversation.harness import HARNESS_TAGS, user_words, without_tags

REMINDER = "<system-reminder>The todo list is empty. Do not mention it.</system-reminder>"


@pytest.mark.parametrize(
    "text",
    [
        "Which is it?",
        "if a < b and b > c",
        "<div>bold</div>",
        "<first_name>Ann</first_name>",
        "",
        "<system-reminder>open",
        "a </system-reminder>",
    ],
)
def test_text_without_a_block_of_a_harness_stays_as_it_is(text: str) -> None:
    assert without_tags(text) is text


def test_blocks_of_a_harness_are_left_out() -> None:
    assert without_tags(f"{REMINDER}\n\nCount the rows.\n\n{REMINDER}") == "Count the rows."
    assert without_tags('Fix it.\n<environment_details mode="x">cwd: /srv</environment_details>') == "Fix it."
    assert without_tags(REMINDER) == ""
    assert (
        without_tags(f"{REMINDER}<system-reminder>never closed, so it stays")
        == "<system-reminder>never closed, so it stays"
    )


def test_a_tag_of_the_users_words_leaves_out_all_the_rest() -> None:
    text = (
        f"<additional_data>file a.py</additional_data> open files\n<user_query>\nSort them.\n</user_query>\n{REMINDER}"
    )
    assert without_tags(text) == "Sort them."


@pytest.mark.parametrize("name", HARNESS_TAGS)
def test_each_tag_is_found(name: str) -> None:
    assert without_tags(f"a <{name}>x</{name}>") == "a"


def test_reminders_count_as_words_only_where_they_are_all_there_is() -> None:
    reminder = "Remember to cite your sources."
    assert user_words([reminder]) == [reminder]
    assert user_words(["Count the rows.", reminder]) == ["Count the rows.", ""]
    assert user_words(["Count the rows.", f"and the others?\n\n{reminder}"]) == ["Count the rows.", "and the others?"]


def test_a_paragraph_that_is_repeated_beside_other_words_is_read_once() -> None:
    boilerplate = "Answer as a polite clerk of the shop, in at most forty words, and never promise anything."
    said = user_words([f"Where is it?\n\n{boilerplate}", f"and the other?\n\n{boilerplate}", f"ok\n\n{boilerplate}"])
    assert said == [f"Where is it?\n\n{boilerplate}", "and the other?", "ok"]


def test_a_question_that_is_asked_again_keeps_its_words() -> None:
    question = "How many customers of Berlin ordered more than three times?"
    assert user_words([question, "What is the capital of Peru?", question])[2] == question


@pytest.mark.parametrize(
    "text",
    [
        "<system-reminder>" * 60_000,
        "<system-reminder" + " " * 1_000_000,
        ("<" * 500_000) + "system-reminder>",
        "<system-reminder>x</system-reminder>" * 30_000,
        "\n \n" * 300_000,
        "".join(f"<{name}>" for name in HARNESS_TAGS) * 2_000,
        "[(*_#" * 200_000,
    ],
    ids=["opening", "spaces", "angles", "closed", "blank lines", "all names", "signs"],
)
def test_a_megabyte_of_anything_is_read_in_linear_time(text: str) -> None:
    before = time.perf_counter()
    user_words([text, "and then?", text])
    assert time.perf_counter() - before < 5.0
