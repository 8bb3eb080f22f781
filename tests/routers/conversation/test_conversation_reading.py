"""What is read of a conversation, how much each turn weighs, and that single turns stay as they are."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from routers.base import EMBEDDING, Estimate, Message, Query
from routers.conversation import MOST_TURNS, main_text, read
from routers.conversation.turns import MOST_CHARACTERS, MOST_INPUTS, dependence, prefix_weights, turns_of

SQL = "The table orders has id and price. Which id has a price over 40?"
SHELL = "Please rename the file old.log to new.log on my machine."
REMINDER = "<system-reminder>List the files of the folder.</system-reminder>"


class Words:
    """A router that knows the experts sql, shell and general by a word; it records what it is asked."""

    requires: frozenset[str] = frozenset()

    def __init__(self, *, ood: bool = True) -> None:
        self.asked: list[list[Query]] = []
        self._ood = ood

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        self.asked.append(list(queries))
        kinds = [0 if "table" in q.text else 1 if "file" in q.text else 2 for q in queries]
        quality = np.full((len(queries), 3), 0.1)
        quality[np.arange(len(queries)), kinds] = 0.9
        known = np.array([kind < 2 for kind in kinds])
        return Estimate(
            ("sql", "shell", "general"),
            quality,
            cost_usd=np.tile([[0.1, 0.2, 0.3]], (len(queries), 1)),
            ood=np.where(known, 0.2, 1.0) if self._ood else None,
            labels=tuple(("sql", "shell", "general")[kind] for kind in kinds),
            eligible=np.ones((len(queries), 3), dtype=bool),
            abstained=~known,
            confidence=np.where(known, 0.9, 0.3),
            reasons=tuple(f"kind {kind}" for kind in kinds),
            truncated=np.array([len(q.text) > 1000 for q in queries]),
            weights=quality * 2,
        )


def talk(*texts: str, roles: str | None = None, **kwargs: object) -> Query:
    """User turns with an answer between them; `roles` gives the first letter of each role instead."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    if roles is not None:
        return Query(tuple(Message(names[r], t) for r, t in zip(roles, texts, strict=True)), **kwargs)  # type: ignore[arg-type]
    messages = [m for text in texts for m in (Message("user", text), Message("assistant", "done"))]
    return Query(tuple(messages[:-1]), **kwargs)  # type: ignore[arg-type]


def best(*queries: Query, router: Words | None = None) -> list[str]:
    estimate = read(router or Words(), queries).estimate
    return [estimate.experts[i] for i in estimate.quality.argmax(axis=1)]


def test_single_turns_reach_the_router_as_they_are_and_its_estimate_comes_back_as_it_is() -> None:
    router = Words()
    queries = [
        Query.of(SQL),
        Query.of("Remember to buy milk.\n\nReminder: and eggs."),
        Query((Message("system", "You are a clerk."), Message("user", SHELL))),
        Query((Message("assistant", "Hello!"), Message("user", "<b>hi</b>"))),
        Query.of("", id="empty"),
        Query((Message("assistant", "no user at all"),)),
    ]
    found = read(router, queries)
    assert len(router.asked) == 1 and all(a is b for a, b in zip(router.asked[0], queries, strict=True))
    assert found.estimate is found.turns
    assert [[turn.weight for turn in reading.turns] for reading in found.readings] == [[1.0]] * 6


def test_single_turns_beside_conversations_keep_every_bit() -> None:
    queries = [Query.of(SQL), talk(SQL, "and the ones over 90?"), Query.of(SHELL)]
    alone, beside = read(Words(), [queries[0], queries[2]]).estimate, read(Words(), queries).estimate
    for single, row in ((0, 0), (1, 2)):
        assert repr(alone.row(single)) == repr(beside.row(row))


def test_the_router_is_called_once_for_all_turns_of_all_queries() -> None:
    router = Words()
    read(router, [talk(SQL, "and then?", "why?"), Query.of(SHELL), talk(SHELL, SQL)])
    assert [len(asked) for asked in router.asked] == [6]


def test_a_follow_up_goes_where_its_subject_went_and_a_new_topic_does_not() -> None:
    assert best(talk(SQL, "and the ones older than 90?")) == ["sql"]
    assert best(talk(SQL, "yes, do that", "same in JSON", "why?")) == ["sql"]
    assert best(talk(SQL, f"thanks, now {SHELL}")) == ["shell"]
    assert best(talk(SQL, SHELL, "and the other one?")) == ["shell"]
    assert best(talk(SQL, "and the ones older than 90?"), router=Words(ood=False)) == ["sql"]


def test_reads_last_takes_the_last_user_turn_alone() -> None:
    query = talk(SQL, "and the ones older than 90?")
    router = Words()
    estimate = read(router, [query], "last").estimate
    assert estimate.labels == ("general",) and router.asked[0] == [query]


def test_weights_decay_with_age_and_sum_to_one() -> None:
    (reading,) = read(Words(), [talk(SQL, "and then?", "why?", "and then?")]).readings
    weights = [turn.weight for turn in reading.turns]
    assert sum(weights) == pytest.approx(1.0) and all(0 <= weight <= 1 for weight in weights)
    assert [turn.message for turn in reading.turns] == [0, 2, 4, 6]
    assert reading.turns[0].alone == 1.0 and reading.turns[3].alone < 0.5
    for weights_of_prefix in prefix_weights([0.0, 0.3, 0.6]):
        assert weights_of_prefix.sum() == pytest.approx(1.0)
    assert prefix_weights([0.0, 0.3, 0.6])[-1].tolist() == pytest.approx([0.18, 0.42, 0.4])


def test_out_of_distribution_turns_depend_more() -> None:
    texts = [SQL, "could you also look at the newest entries"]
    low, unknown, high = (dependence(texts, ood)[1] for ood in (np.array([0.0, 0.2]), None, np.array([0.0, 1.0])))
    assert low < unknown < high


def test_every_field_of_an_estimate_is_mixed() -> None:
    (reading,), mixed = (found := read(Words(), [talk(SQL, SHELL, "and then?")])).readings, found.estimate
    weights = np.array([turn.weight for turn in reading.turns])
    assert mixed.quality[0] == pytest.approx(weights @ found.turns.quality)
    assert mixed.weights is not None and mixed.weights[0] == pytest.approx(2 * mixed.quality[0])
    assert mixed.cost_usd is not None and mixed.cost_usd[0] == pytest.approx([0.1, 0.2, 0.3])
    assert (
        mixed.ood is not None
        and found.turns.ood is not None
        and mixed.ood[0] == pytest.approx(weights @ found.turns.ood)
    )
    assert mixed.labels == ("shell",) and mixed.abstained is not None and not mixed.abstained[0]
    assert mixed.reasons == ("by user turn 2 of the 3 read: kind 1",)
    assert mixed.confidence is not None and mixed.confidence[0] == pytest.approx(0.9 * weights[1])
    assert mixed.truncated is not None and not mixed.truncated[0]


def test_a_reason_that_all_turns_share_names_no_turn() -> None:
    class Fixed(Words):
        def estimate(self, queries: Sequence[Query]) -> Estimate:
            return replace(super().estimate(queries), reasons=("the policy names this expert",) * len(queries))

    mixed = read(Fixed(), [talk(SQL, SHELL, "and then?")]).estimate
    assert mixed.reasons == ("the policy names this expert",)


def test_the_words_of_a_harness_do_not_decide() -> None:
    assert best(talk(f"{SQL}\n\n{REMINDER}", f"and the ones over 90?\n\n{REMINDER}")) == ["sql"]
    assert best(Query.of(f"{REMINDER}\n\n{SQL}")) == ["sql"]
    assert best(talk(SQL, REMINDER)) == ["sql"]  # the last turn is a reminder alone
    assert best(Query.of("<system-reminder>a file</system-reminder>")) == ["shell"]  # there is nothing else to read


def test_in_an_agent_loop_the_words_are_those_of_the_last_user_turn() -> None:
    query = talk(SQL, "ok", SHELL, "call", "27 rows of the table", roles="uauat")
    assert best(query) == ["shell"]


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        (talk("Hi, what can I do?", SQL, roles="au"), [SQL]),
        (talk("one", "", "  ", "and then?"), ["one", "and then?"]),
        (talk("", "", roles="uu"), [""]),
        (talk("You are a clerk.", roles="s"), [""]),
        (talk(SQL, "and then?", raw=True), ["and then?"]),
        (talk(SQL, "and then?", features={"hidden/a": np.zeros(2)}), ["and then?"]),
        (talk(*(f"question {i}" for i in range(500))), [f"question {i}" for i in range(500 - MOST_TURNS, 500)]),
        (talk("x" * 1_000_000, "why?"), ["x" * MOST_CHARACTERS, "why?"]),
    ],
    ids=["assistant first", "empty turns", "only empty turns", "no user", "raw", "features", "500 turns", "long turn"],
)
def test_which_turns_are_read(query: Query, texts: list[str]) -> None:
    assert [turn.text for turn in turns_of(query)] == texts
    assert len(read(Words(), [query]).estimate) == 1


def inputs(*texts: str) -> Query:
    return Query(tuple(Message("user", text) for text in texts), raw=True, needs=frozenset({EMBEDDING}))


def test_texts_to_embed_are_read_one_by_one_and_weigh_the_same() -> None:
    router = Words()
    query = inputs(SQL, SHELL, "The table is blue.", REMINDER)
    found = read(router, [query, Query.of(SQL)])
    assert [each.text for each in router.asked[0]] == [SQL, SHELL, "The table is blue.", REMINDER, SQL]
    assert [(turn.message, turn.weight) for turn in found.readings[0].turns] == [(i, 0.25) for i in range(4)]
    alone = read(Words(), [inputs(each.content) for each in query.messages]).estimate
    assert found.estimate.quality[0] == pytest.approx(alone.quality.mean(axis=0))
    assert found.estimate.quality[1].tolist() == [0.9, 0.1, 0.1]
    assert [best(query), best(inputs(SQL, SHELL, SHELL)), best(inputs(SQL))] == [["sql"], ["shell"], ["sql"]]
    assert read(Words(), [inputs(*["a"] * 40, "x" * 2000)]).estimate.truncated.tolist() == [False]  # not read
    assert read(Words(), [inputs(*["a"] * 30, "x" * 2000)]).estimate.truncated.tolist() == [True]


def test_a_router_that_leaves_one_expert_eligible_goes_by_the_majority_of_the_texts_to_embed() -> None:
    class OneEligible(Words):
        def estimate(self, queries: Sequence[Query]) -> Estimate:
            found = super().estimate(queries)
            return replace(found, eligible=found.quality > 0.5)

    estimate = read(OneEligible(), [inputs(SQL, SHELL, SHELL), inputs(SQL, SHELL), inputs(SHELL)]).estimate
    assert estimate.eligible is not None
    assert estimate.eligible.tolist() == [[False, True, False], [True, False, False], [False, True, False]]
    assert estimate.labels == ("shell", "sql", "shell")


def test_of_many_texts_to_embed_some_are_read_of_all_parts() -> None:
    found = turns_of(inputs(*(f"text {i}" for i in range(2048))), "last")
    assert [turn.message for turn in found] == list(range(0, 2048, 2048 // MOST_INPUTS))
    assert [len(turn.text) for turn in turns_of(inputs("x" * 100_000, "y"))] == [MOST_CHARACTERS, 1]
    assert [len(turn.text) for turn in turns_of(inputs("x" * 100_000))] == [100_000]


def test_an_empty_answer_changes_nothing_that_is_read() -> None:
    query = talk(SQL, "and the ones over 90?", SHELL)
    empty = replace(
        query, messages=tuple(replace(m, content="") if m.role == "assistant" else m for m in query.messages)
    )
    assert turns_of(empty) == turns_of(query)
    [(found,), (expected,)] = (read(Words(), [one]).readings for one in (empty, query))
    assert found.turns == expected.turns
    assert best(empty) == best(query) == ["shell"]


def test_five_hundred_turns_take_no_longer_than_a_few() -> None:
    query = talk(*("and then? " + "x " * 2000 for _ in range(500)))
    before = time.perf_counter()
    read(Words(), [query])
    assert time.perf_counter() - before < 2.0


def test_the_text_that_is_trained_on_is_that_of_the_turn_that_weighs_most() -> None:
    assert main_text(talk(SQL, "and the ones older than 90?").messages) == SQL
    assert main_text(talk(SQL, SHELL).messages) == SHELL
    assert main_text(Query.of(SQL).messages) == SQL
