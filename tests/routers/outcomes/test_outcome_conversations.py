"""Tables whose rows are conversations: read, written, trained on and evaluated by the rule of serving."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.base import Message, Query
from routers.conversation import estimate
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidOutcomes
from routers.evaluation.recorded_routing import route
from routers.factory import build
from routers.outcomes.conversations import conversation_of
from routers.outcomes.table import OutcomeTable

SQL = "How many rows of the table orders have the status open?"
SHELL = "Please move the file notes.txt into the folder old on my disk."


def talk(*texts: str) -> list[dict[str, str]]:
    messages = [
        m for text in texts for m in ({"role": "user", "content": text}, {"role": "assistant", "content": "ok"})
    ]
    return messages[:-1]


ROWS: list[dict[str, Any]] = [
    {"query_id": "a", "prompt": SQL, "score::sql": 1, "score::shell": 0},
    {"query_id": "b", "messages": talk(SQL, "and those over 90?"), "score::sql": 1, "score::shell": 0},
    {"query_id": "c", "messages": json.dumps(talk(SQL, SHELL)), "score::sql": 0, "score::shell": 1},
    {"query_id": "d", "prompt": "kept?", "messages": talk(SHELL, "why?", "yes"), "score::sql": 0, "score::shell": 1},
]


def table(rows: list[dict[str, Any]] = ROWS) -> OutcomeTable:
    return OutcomeTable.from_frame(pd.DataFrame(rows))


def test_the_prompt_of_a_conversation_is_the_turn_that_weighs_most() -> None:
    read = table()
    assert read.prompts == (SQL, SQL, SHELL, SHELL)
    assert [len(messages) for messages in read.conversations or ()] == [0, 3, 3, 5]
    assert [query.text for query in read.queries()] == [SQL, "and those over 90?", SHELL, "yes"]
    assert read.select([2]).queries() == [
        Query((Message("user", SQL), Message("assistant", "ok"), Message("user", SHELL)))
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_conversations_survive_every_file_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"outcomes{suffix}"
    table().write(path)
    again = OutcomeTable.read(path)
    assert again.conversations == table().conversations and again.prompts == table().prompts
    assert again.queries() == table().queries()


def test_lists_of_messages_are_read_from_jsonl_and_parquet(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "t.jsonl", tmp_path / "t.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = [row for row in ROWS if not isinstance(row.get("messages"), str)]
    pd.DataFrame(rows).to_parquet(parquet)
    assert OutcomeTable.read(jsonl).conversations == table().conversations
    assert OutcomeTable.read(parquet).conversations == table(rows).conversations


def test_a_table_without_conversations_has_none_and_writes_no_column() -> None:
    plain = table(ROWS[:1])
    assert plain.conversations is None and "messages" not in plain.to_frame()
    assert plain.queries() == [Query.of(SQL)]


@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("as_text", [False, True])
def test_an_answer_may_be_empty(empty: dict[str, str | None], as_text: bool) -> None:
    turns = [{"role": "user", "content": SQL}, {"role": "assistant", **empty}, {"role": "user", "content": SHELL}]
    found = conversation_of(json.dumps(turns) if as_text else turns)
    assert found == (Message("user", SQL), Message("assistant", ""), Message("user", SHELL))
    assert table([{**ROWS[1], "messages": turns}]).prompts == (SHELL,)


@pytest.mark.parametrize(
    "cell",
    [
        *("not JSON", "[]", [], 5, "[" * 100_000, [{"role": "user"}], [{"role": "robot", "content": "x"}], [SQL]),
        *([{"role": "user", "content": 3}], [{"role": "user", "content": "x", "name": "Ann"}], talk("x") * 5000),
        *([{"role": "user", "content": None}], [{"role": ["user"], "content": "x"}], [{"content": "x"}]),
    ],
    ids=range(14),
)
def test_cells_that_hold_no_conversation_are_refused_with_their_row(cell: object) -> None:
    with pytest.raises(InvalidOutcomes, match=r"column 'messages' is not a list .* in 1 row: 2"):
        table([ROWS[1], {**ROWS[1], "query_id": "x", "messages": cell}])


def test_a_row_needs_a_prompt_or_messages_and_valid_unicode() -> None:
    with pytest.raises(InvalidOutcomes, match="neither `prompt` nor `messages` is given in 1 row: 2"):
        table([ROWS[1], {"query_id": "x", "score::sql": 1, "score::shell": 0}])
    with pytest.raises(InvalidOutcomes, match="surrogate"):
        table([{**ROWS[1], "messages": talk("\ud800", "x")}])


@pytest.mark.parametrize("kind", ["knn", "category", "quality", "guarded"])
def test_a_router_trained_on_conversations_routes_them_as_it_serves_them(kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        first, second = (SQL, SHELL) if rng.random() < 0.5 else (SHELL, SQL)
        messages = [talk(f"{first} {i}"), talk(f"{first} {i}", "and the others?"), talk(first, f"{second} {i}")][i % 3]
        right = second if i % 3 == 2 else first
        scores = {"score::sql": float(right == SQL), "score::shell": float(right == SHELL)}
        rows.append({"query_id": str(i), "messages": messages, "domain": "sql" if right == SQL else "shell", **scores})
    whole = table(rows)
    settings = {"kind": "knn"} if kind == "guarded" else {}
    router = build(kind, HashingEncoder(256), settings).fit(whole.select(np.arange(60) < 45))
    held_out = whole.select(np.arange(60) >= 45)
    routing = route(router, held_out)
    assert held_out.scores[np.arange(15), routing.picks].mean() >= 0.9
    served = estimate(router, held_out.queries())
    assert routing.quality.tobytes() == np.asarray(served.quality, dtype=np.float64).tobytes()


def test_rows_with_features_are_read_by_their_prompt() -> None:
    from dataclasses import replace

    featured = replace(table(), features={"hidden/a": np.zeros((4, 2))})
    assert [query.text for query in featured.queries()] == [SQL, SQL, SHELL, SHELL]
