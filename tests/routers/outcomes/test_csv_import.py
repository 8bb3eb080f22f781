import numpy as np
import pytest

from routers.errors import InvalidOutcomes
from routers.outcomes.csv_import import import_csv


def written(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_wide_file_with_its_own_column_names(tmp_path):
    path = written(tmp_path, "id,question,gpt,llama\n1,what?,100,0\n2,who?,50,100\n")
    table = import_csv(
        path, columns={"id": "query_id", "question": "prompt"}, score_columns=["gpt", "llama"], scale=100
    )
    assert table.query_ids == ("1", "2")
    assert table.experts == ("gpt", "llama")
    np.testing.assert_array_equal(table.scores, [[1, 0], [0.5, 1]])


def test_missing_ids_are_made_of_the_prompt(tmp_path):
    first = import_csv(written(tmp_path, "prompt,score::m\na,1\nb,0\n"))
    second = import_csv(written(tmp_path, "prompt,score::m\nb,0\na,1\n"))
    assert first.query_ids == second.query_ids[::-1]
    assert len(set(first.query_ids)) == 2


def test_a_long_file_is_widened_in_the_order_of_the_file(tmp_path):
    text = (
        "query_id,prompt,domain,expert,score,cost,tokens,answer\n"
        "q2,who?,people,big,1,0.2,,X\nq2,who?,people,small,0.5,0.1,,\n"
        "q1,what?,things,small,0,0.1,,Y\nq1,what?,things,big,1,0.3,,Z\n"
    )
    table = import_csv(written(tmp_path, text))
    assert (table.query_ids, table.experts) == (("q2", "q1"), ("big", "small"))
    assert (table.prompts, table.domains) == (("who?", "what?"), ("people", "things"))
    np.testing.assert_array_equal(table.scores, [[1, 0.5], [1, 0]])
    np.testing.assert_array_equal(table.costs_usd, [[0.2, 0.1], [0.3, 0.1]])
    assert table.tokens is None
    assert table.answers == {"big": ("X", "Z"), "small": ("", "Y")}


def test_an_expert_that_lacks_a_query_is_named(tmp_path):
    text = "query_id,prompt,expert,score\nq1,a,m,1\nq1,a,n,1\nq2,b,m,0\n"
    with pytest.raises(InvalidOutcomes, match=r"score::n is missing \(NaN\) in 1 row: 2"):
        import_csv(written(tmp_path, text))


def test_all_problems_of_a_long_file_are_told_at_once(tmp_path):
    text = "query_id,prompt,expert,score\nq1,a,m,1\nq1,a,m,0\nq2,b,m,0\nq2,c,n,0\nq3,d,,1\n"
    with pytest.raises(InvalidOutcomes) as caught:
        import_csv(written(tmp_path, text))
    assert list(caught.value.problems) == [
        "query_id or expert is empty in 1 rows",
        "1 rows repeat a query and expert, first 'q1' and 'm'",
        "column 'prompt' differs between rows of one query, first 'q2'",
    ]


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path):
    with pytest.raises(InvalidOutcomes, match="no column 'gtp'; the file has: prompt, gpt"):
        import_csv(written(tmp_path, "prompt,gpt\na,1\n"), score_columns=["gtp"])


def test_a_scale_must_be_positive_and_no_number_is_reported(tmp_path):
    path = written(tmp_path, "prompt,score::m\na,ten\n")
    with pytest.raises(InvalidOutcomes, match="scale of scores must be > 0, got 0"):
        import_csv(path, scale=0)
    with pytest.raises(InvalidOutcomes, match="score::m is missing"):
        import_csv(path, scale=10)
