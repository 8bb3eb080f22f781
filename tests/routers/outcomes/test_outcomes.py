import csv
import json
import os

import numpy as np
import pandas as pd
import pytest

from registry.spec import Price
from routers.errors import InvalidOutcomes
from routers.outcomes.table import OutcomeTable


def table(**changes):
    arguments = {
        "query_ids": ("a", "b", "c"),
        "prompts": ("one plus one?", "NA", "say\u2028hi\n"),
        "experts": ("small", "org/large"),
        "scores": np.array([[1, 0], [0.25, 1], [0, 1 / 3]]),
        "costs_usd": np.array([[0.1, 0.2], [0.1, 0.3], [0.0, 0.4]]),
        "tokens": np.array([[10, 20], [30, 40], [0, 5]]),
        "domains": ("maths", "chat", "chat"),
        "folds": np.array([0, 1, 0]),
        "answers": {"small": ("2", "", "hi")},
        "frame": pd.DataFrame({"dataset": ["x", "y", "y"], "level": [1, 2, 3]}),
    }
    return OutcomeTable(**{**arguments, **changes})


def rows(**changes):
    """Two good rows, as columns, some of them replaced; None leaves a column out."""
    columns = {"query_id": ["q1", "q2"], "prompt": ["a", "b"], "score::m1": [0.0, 1.0], "score::m2": [1.0, 0.5]}
    return pd.DataFrame({name: values for name, values in {**columns, **changes}.items() if values is not None})


def problems(frame):
    with pytest.raises(InvalidOutcomes) as caught:
        OutcomeTable.from_frame(frame, source="some.parquet")
    assert str(caught.value).startswith("some.parquet: ")
    return list(caught.value.problems)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_written_table_reads_back_equal(tmp_path, suffix):
    path = tmp_path / "new" / f"t{suffix}"
    table().write(path)
    read = OutcomeTable.read(path)
    expected = table()
    assert (read.query_ids, read.prompts, read.experts) == (expected.query_ids, expected.prompts, expected.experts)
    assert (read.domains, read.answers) == (expected.domains, expected.answers)
    for name in ("scores", "costs_usd", "tokens", "folds"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert list(read.frame["dataset"]) == ["x", "y", "y"]
    assert list(map(int, read.frame["level"])) == [1, 2, 3]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_bare_table_reads_back_equal(tmp_path):
    bare = table(costs_usd=None, tokens=None, domains=None, folds=None, answers=None, frame=None)
    bare.write(tmp_path / "t.jsonl")
    read = OutcomeTable.read(tmp_path / "t.jsonl")
    assert (read.costs_usd, read.tokens, read.domains, read.folds, read.answers, read.frame) == (None,) * 6
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["score::small"] == 1.0


def test_jsonl_keeps_missing_values_lists_and_other_objects_of_other_columns(tmp_path):
    frame = pd.DataFrame({"note": [None, "x", "y"], "options": [np.array([1, 2])] * 3, "day": [pd.Timestamp(0)] * 3})
    table(frame=frame).write(tmp_path / "t.jsonl")
    first = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert (first["note"], first["options"], first["day"]) == (None, [1, 2], "1970-01-01 00:00:00")


def test_all_problems_of_a_frame_are_told_at_once():
    frame = pd.DataFrame(
        {
            "query_id": ["a", "a", "b", "b", "c"],
            "prompt": ["x", None, "y", "z", "w"],
            "score::m1": [0.0, 1.5, 0.0, 1.0, -0.5],
            "score::m2": ["1", "wrong", None, "0", "nan"],
            "cost::m1": [0.0, -1.0, np.inf, 0.0, 0.0],
            "tokens::other": [1, 2, 3, 4, 5],
            "fold": [0, 1, 0.5, 1, 0],
        }
    )
    assert problems(frame) == [
        "column 'score::m2' is not a number in 1 row: 2",
        "only some experts have a cost:: column; without one: m2",
        "column 'tokens::other' has no matching column 'score::other'",
        "only some experts have a tokens:: column; without one: m1, m2",
        "column 'prompt' is empty in 1 row: 2",
        "column 'fold' is not a whole number in 1 row: 3",
        "duplicate query id: 'a' (rows 1, 2), 'b' (rows 3, 4)",
    ]


def test_values_at_fault_are_named_by_expert_and_row():
    frame = rows(**{"score::m1": [np.nan, 2.0], "cost::m1": [-1.0, 0.0], "cost::m2": [np.nan, np.inf]})
    assert problems(frame) == [
        "score::m1 is missing (NaN) in 1 row: 1",
        "score::m1 lies outside [0, 1] in 1 row: 2",
        "cost::m1 is negative in 1 row: 1",
        "cost::m2 is missing or not finite in 2 rows: 1, 2",
    ]


def test_only_the_first_few_rows_and_ids_are_named():
    n = 9
    frame = pd.DataFrame({"query_id": [str(i) for i in range(n)], "prompt": ["x"] * n, "score::m": [2.0] * n})
    assert problems(frame) == ["score::m lies outside [0, 1] in 9 rows: 1, 2, 3, 4, 5, ..."]
    twice = pd.concat([frame.assign(**{"score::m": 0.5})] * 2)
    assert problems(twice)[0].endswith("'4' (rows 5, 14) and 4 more")


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (rows(prompt=None), "there is no column 'prompt'"),
        (rows(query_id=None), "there is no column 'query_id'"),
        (rows(**{"score::m1": None, "score::m2": None}), "no experts: there is no `score::<expert>` column"),
        (rows().iloc[:0], "the table is empty: it has no rows"),
        (rows(domain=["maths", None]), "column 'domain' is empty in 1 row: 2"),
        (rows(fold=["first", "second"]), "column 'fold' is not a number in 2 rows: 1, 2"),
        (rows(**{"answer::m9": ["A", "B"]}), "answers of 'm9', which has no scores"),
    ],
)
def test_a_single_problem_is_told(frame, expected):
    assert expected in problems(frame)[0]


def test_empty_optional_columns_count_as_absent():
    read = OutcomeTable.from_frame(rows(domain=[None, None], fold=[np.nan, np.nan]))
    assert read.domains is None
    assert read.folds is None


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(InvalidOutcomes) as caught:
        table(scores=np.zeros((3, 3)), prompts=("x",), experts=("small", "small"), answers={"small": ("1",)})
    assert list(caught.value.problems) == [
        "duplicate expert: 'small'",
        "scores has shape (3, 3), expected (3, 2) for 3 queries and 2 experts",
        "prompts has 1 entries for 3 queries",
        "answers['small'] has 1 entries for 3 queries",
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.parquet", b"PAR1 and then nothing", "damaged or not Parquet"),
        ("t.jsonl", b'{"query_id": "a"}\n{"query_id": "b', "line 2: Unterminated string"),
        (
            "t.jsonl",
            b'{"a": 1, "a": 2}\n\n[1]\n',
            "2 problems\n  - line 1: duplicate key 'a'\n  - line 3: expected a JSON object",
        ),
        ("t.jsonl", b"\xff\xfe", "cannot be read as UTF-8 text"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"query_id,prompt,score::m,score::m\n1,a,0,0\n", "duplicate column 'score::m'"),
        ("t.csv", b"query_id,prompt\n1,a,b,c,d\n", "not a CSV file"),
        ("t.xlsx", b"", "unknown file format '.xlsx': use .parquet, .jsonl, .csv"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidOutcomes) as caught:
        OutcomeTable.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    table().write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidOutcomes, match="damaged or not Parquet"):
        OutcomeTable.read(path)


def test_duplicate_parquet_columns_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    doubled = pa.table([["1"], [0.5], [0.5]], names=["query_id", "score::m", "score::m"])
    pq.write_table(doubled, tmp_path / "t.parquet")
    with pytest.raises(InvalidOutcomes, match="duplicate column 'score::m'"):
        OutcomeTable.read(tmp_path / "t.parquet")


def test_missing_files_and_unknown_suffixes(tmp_path):
    with pytest.raises(InvalidOutcomes, match="no such file"):
        OutcomeTable.read(tmp_path / "t.parquet")
    with pytest.raises(InvalidOutcomes, match=r"cannot write '\.txt'"):
        table().write(tmp_path / "t.txt")


def test_csv_cells_are_text_until_they_are_numbers(tmp_path):
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["query_id", "prompt", "score::m"], ["007", "NA", "0.5"], ["8", "two\nlines", "1"]])
    read = OutcomeTable.read(tmp_path / "t.csv")
    assert read.query_ids == ("007", "8")
    assert read.prompts == ("NA", "two\nlines")


def test_select_takes_rows_in_order_from_every_column():
    picked = table().select([2, 0])
    assert picked.query_ids == ("c", "a")
    assert picked.domains == ("chat", "maths")
    assert picked.answers == {"small": ("hi", "2")}
    assert list(picked.frame["level"]) == [3, 1]
    np.testing.assert_array_equal(picked.scores, [[0, 1 / 3], [1, 0]])
    np.testing.assert_array_equal(picked.folds, [0, 0])
    assert table().select(np.array([False, True, False])).query_ids == ("b",)
    assert len(table(costs_usd=None, tokens=None, domains=None, folds=None, answers=None, frame=None).select([1])) == 1


def test_selecting_nothing_is_refused():
    with pytest.raises(InvalidOutcomes, match="empty"):
        table().select(np.zeros(3, dtype=bool))


def test_with_experts_reorders_and_restricts():
    one = table().with_experts(["org/large"])
    assert one.experts == ("org/large",)
    assert one.answers == {}
    np.testing.assert_array_equal(one.costs_usd, [[0.2], [0.3], [0.4]])
    np.testing.assert_array_equal(table().with_experts(["org/large", "small"]).scores, table().scores[:, ::-1])


def test_unknown_experts_are_named_with_close_matches():
    with pytest.raises(InvalidOutcomes) as caught:
        table().with_experts(["smal", "zzz"])
    assert "no expert 'smal' in the table; did you mean 'small'?" in str(caught.value)
    assert "no expert 'zzz' in the table; there are: small, org/large" in str(caught.value)


def test_labels_are_domains_or_any_column_as_text():
    assert table().labels() == ("maths", "chat", "chat")
    assert table().labels("level") == ("1", "2", "3")
    with pytest.raises(InvalidOutcomes, match="no column 'levle' in the table; did you mean 'level'"):
        table().labels("levle")
    with pytest.raises(InvalidOutcomes, match="no column 'domain' in the table; there are: none"):
        table(domains=None, frame=None).labels()
    with pytest.raises(InvalidOutcomes, match="column 'note' is empty in 1 row: 2"):
        table(frame=pd.DataFrame({"note": ["a", None, "b"]})).labels("note")


def test_the_digest_names_the_set_of_queries():
    digest = table().training_ids_digest()
    assert digest == table().select([2, 1, 0]).training_ids_digest()
    assert digest != table().select([0, 1]).training_ids_digest()
    assert digest.startswith("sha256:")
    assert len(digest) == 7 + 64


PRICES = {
    "small": Price(input_usd_per_mtok=1, output_usd_per_mtok=2),
    "org/large": Price(input_usd_per_mtok=10, output_usd_per_mtok=20),
}


def test_prices_times_tokens_are_costs():
    counted = table(frame=pd.DataFrame({"prompt_tokens": [100, 200, 300]})).with_prices(PRICES)
    np.testing.assert_allclose(counted.costs_usd[0], [(100 * 1 + 10 * 2) / 1e6, (100 * 10 + 20 * 20) / 1e6])
    estimated = table().with_prices(PRICES)  # 13 characters are 3.25 tokens
    np.testing.assert_allclose(estimated.costs_usd[0], [(3.25 * 1 + 10 * 2) / 1e6, (3.25 * 10 + 20 * 20) / 1e6])


def test_without_token_counts_an_expert_costs_the_same_for_every_query():
    costs = table(tokens=None).with_prices(PRICES).costs_usd
    np.testing.assert_allclose(costs, [[500 * 3e-6, 500 * 30e-6]] * 3)


def test_experts_without_a_price_are_named():
    with pytest.raises(InvalidOutcomes, match="no price for org/large"):
        table().with_prices({"small": PRICES["small"]})


def test_features_follow_their_rows_into_queries():
    queries = table(features={"entropy": np.arange(6.0).reshape(3, 2)}).select([2, 0]).queries()
    assert [query.text for query in queries] == ["say\u2028hi\n", "one plus one?"]
    assert [query.features["entropy"].tolist() for query in queries] == [[4.0, 5.0], [0.0, 1.0]]


def test_features_need_a_row_for_each_query():
    with pytest.raises(InvalidOutcomes, match=r"features\['entropy'\] has 2 entries for 3 queries"):
        table(features={"entropy": np.zeros((2, 4))})


def test_a_pipe_is_not_read_as_a_table(tmp_path):
    os.mkfifo(tmp_path / "table.jsonl")
    with pytest.raises(InvalidOutcomes, match="is not a regular file"):
        OutcomeTable.read(tmp_path / "table.jsonl")
