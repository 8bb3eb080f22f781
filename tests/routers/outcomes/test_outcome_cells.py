"""Cells of outcome files are kept as they were written, or refused with their row; alike in every format."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routers.errors import InvalidOutcomes
from routers.outcomes.csv_import import import_csv
from routers.outcomes.table import OutcomeTable

SURROGATE = json.loads('"\\ud83d"')


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(number, **changes):
    return {"query_id": f"q{number}", "prompt": f"prompt {number}", "score::m": 1, **changes}


def problems(path):
    with pytest.raises(InvalidOutcomes) as caught:
        OutcomeTable.read(path)
    return caught.value.problems


MIXED = [5, None, 12345678901234567]


def test_json_answers_of_mixed_types_keep_their_digits(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [row(i, **{"answer::m": value}) for i, value in enumerate(MIXED)])
    assert OutcomeTable.read(path).answers["m"] == ("5", "", "12345678901234567")


def test_parquet_integers_beside_nulls_keep_their_digits(tmp_path):
    columns = {"query_id": [1, 2, 12345678901234567], "prompt": ["a", "b", "c"], "score::m": [1, 0, 1]}
    pq.write_table(pa.table({**columns, "answer::m": pa.array(MIXED, pa.int64())}), tmp_path / "t.parquet")
    read = OutcomeTable.read(tmp_path / "t.parquet")
    assert read.answers["m"] == ("5", "", "12345678901234567")
    assert read.query_ids == ("1", "2", "12345678901234567")


def test_csv_answers_keep_their_digits(tmp_path):
    (tmp_path / "t.csv").write_text("query_id,prompt,score::m,answer::m\n1,a,1,5\n2,b,0,\n3,c,1,12345678901234567\n")
    assert OutcomeTable.read(tmp_path / "t.csv").answers["m"] == ("5", "", "12345678901234567")


def test_json_numbers_keep_their_spelling_as_text(tmp_path):
    lines = ['{"query_id": 1e3, "prompt": 2.50, "score::m": 1e-1, "answer::m": 1.10, "level": 0.5}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    read = OutcomeTable.read(tmp_path / "t.jsonl")
    assert (read.query_ids, read.prompts, read.answers["m"]) == (("1e3",), ("2.50",), ("1.10",))
    assert read.scores.tolist() == [[0.1]]
    assert read.frame["level"].tolist() == [0.5]
    assert type(read.frame["level"].tolist()[0]) is float


@pytest.mark.parametrize("column", ["query_id", "prompt", "domain", "answer::m"])
@pytest.mark.parametrize("value", [[{"role": "user", "content": "hi"}], {"text": "hi"}, True])
def test_what_is_no_text_is_refused_with_its_row(tmp_path, column, value):
    rows = [row(1, domain="x", **{"answer::m": "a"}), row(2, domain="x", **{"answer::m": "b"}) | {column: value}]
    assert problems(jsonl(tmp_path / "t.jsonl", rows)) == (f"column {column!r} is not text or a number in 1 row: 2",)


@pytest.mark.parametrize("values", [[[{"role": "user", "content": "hi"}], []], [b"one", b"two"]])
def test_what_is_no_text_in_parquet_is_refused_with_its_rows(tmp_path, values):
    pq.write_table(pa.table({"query_id": ["a", "b"], "prompt": values, "score::m": [0, 1]}), tmp_path / "t.parquet")
    assert problems(tmp_path / "t.parquet") == ("column 'prompt' is not text or a number in 2 rows: 1, 2",)


def test_dates_and_categories_of_parquet_are_text(tmp_path):
    day = datetime.date(2026, 1, 2)
    columns = {"query_id": [day, day + datetime.timedelta(1)], "prompt": ["a", "b"], "score::m": [0, 1]}
    domain = pa.array(["x", "y"]).dictionary_encode()
    answers = pa.array([None, "x"]).dictionary_encode()
    pq.write_table(pa.table({**columns, "domain": domain, "answer::m": answers}), tmp_path / "t.parquet")
    read = OutcomeTable.read(tmp_path / "t.parquet")
    assert (read.query_ids, read.domains, read.answers["m"]) == (("2026-01-02", "2026-01-03"), ("x", "y"), ("", "x"))


@pytest.mark.parametrize("column", ["query_id", "prompt", "domain", "answer::m", "note"])
def test_half_of_a_surrogate_pair_is_refused_with_its_row(tmp_path, column):
    rows = [row(i, domain="x", note="n", **{"answer::m": "a"}) for i in range(3)]
    rows[1][column] = f"a {SURROGATE} b"
    found = problems(jsonl(tmp_path / "t.jsonl", rows))
    assert found == (f"column {column!r} has half of a surrogate pair, which is no valid Unicode, in 1 row: 2",)


def test_an_expert_whose_name_is_no_unicode_is_refused(tmp_path):
    found = problems(jsonl(tmp_path / "t.jsonl", [row(1) | {f"score::{SURROGATE}": 1}]))
    assert found == ("line 1: a key has half of a surrogate pair, which is no valid Unicode",)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_odd_texts_read_back_as_they_were(tmp_path, suffix):
    prompts = (
        "bare \r return",
        "",
        'quote " and, comma',
        "two\r\nlines",
        "nul \0 inside",
        "x" * 300_000,
        "\ufeffbom",
        " ",
    )
    n = len(prompts)
    table = OutcomeTable(
        query_ids=tuple(map(str, range(n))), prompts=prompts, experts=("m",), scores=np.full((n, 1), 0.1),
        answers={"m": ("NA", "", "007", "1e3", "null", "nan", "true", "\r")},
    )  # fmt: skip
    table.write(tmp_path / f"t{suffix}")
    read = OutcomeTable.read(tmp_path / f"t{suffix}")
    assert (read.prompts, read.answers) == (table.prompts, table.answers)
    assert read.scores.tolist() == table.scores.tolist()


def test_a_return_outside_quotes_ends_a_row_which_is_refused_with_its_number(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"query_id,prompt,score::m\n1,a,0\n2,b\rc,1\n")
    assert "Row #3: Expected 3 columns, got 2" in problems(tmp_path / "t.csv")[0]


def test_rows_of_another_length_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"query_id,prompt,score::m\n1,a\n")
    assert "Expected 3 columns, got 2" in problems(tmp_path / "t.csv")[0]


def test_an_unquoted_empty_prompt_is_refused_with_its_row(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"query_id,prompt,score::m\n1,a,0\n2,,1\n")
    assert problems(tmp_path / "t.csv") == ("column 'prompt' is empty in 1 row: 2",)


def test_spreadsheets_quote_missing_cells_too(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b'"query_id","prompt","score::m","domain"\r\n"1","a","0.5",""\r\n"2","b","1",""\r\n'
    )
    read = OutcomeTable.read(tmp_path / "t.csv")
    assert read.domains is None
    assert read.scores.tolist() == [[0.5], [1.0]]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfquery_id,prompt,score::m\n1,a,0\n")
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row(1)).encode())
    assert OutcomeTable.read(tmp_path / "t.csv").query_ids == ("1",)
    assert OutcomeTable.read(tmp_path / "t.jsonl").query_ids == ("q1",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, 1.0), (False, 0.0), ("0.25", 0.25), (1, 1.0), ("true", 1.0)],
)
def test_scores_that_mean_a_number_are_read(tmp_path, value, expected):
    path = jsonl(tmp_path / "t.jsonl", [row(1, **{"score::m": value}), row(2, **{"score::m": 0.5})])
    assert OutcomeTable.read(path).scores.tolist() == [[expected], [0.5]]


def test_boolean_scores_of_parquet_and_csv(tmp_path):
    frame = pd.DataFrame({"query_id": ["a", "b"], "prompt": ["x", "y"], "score::m": [True, False]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    for name in ("t.parquet", "t.csv"):
        assert OutcomeTable.read(tmp_path / name).scores.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NaN", "score::m is missing (NaN) in 1 row: 1"),
        ("null", "score::m is missing (NaN) in 1 row: 1"),
        ("Infinity", "score::m lies outside [0, 1] in 1 row: 1"),
        ("1e999", "score::m lies outside [0, 1] in 1 row: 1"),
        ("1" + "0" * 400, "column 'score::m' is not a number in 1 row: 1"),
        ("[1]", "column 'score::m' is not a number in 1 row: 1"),
        ('{"value": 1}', "column 'score::m' is not a number in 1 row: 1"),
        ('"yes"', "column 'score::m' is not a number in 1 row: 1"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ("1" * 5000, "line 1: score::m: a whole number of 5,000 digits; at most 4,300 are read"),
    ],
)
def test_scores_that_mean_none_are_refused_with_their_row(tmp_path, text, expected):
    (tmp_path / "t.jsonl").write_text(f'{{"query_id": 1, "prompt": "a", "score::m": {text}}}\n')
    assert problems(tmp_path / "t.jsonl")[0].startswith(expected)


def test_a_fold_beyond_every_table_is_refused(tmp_path):
    found = problems(jsonl(tmp_path / "t.jsonl", [row(1, fold=0), row(2, fold=1e300)]))
    assert found == ("column 'fold' is not a whole number in 1 row: 2",)


def test_an_imported_csv_file_keeps_what_it_says(tmp_path):
    (tmp_path / "t.csv").write_text("id,question,score::m,answer::m\n007,NA,1,12345678901234567\n08,x,0,\n")
    read = import_csv(tmp_path / "t.csv", columns={"id": "query_id", "question": "prompt"})
    assert (read.query_ids, read.prompts) == (("007", "08"), ("NA", "x"))
    assert read.answers["m"] == ("12345678901234567", "")


def test_other_columns_are_kept_as_they_are(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [row(i, note=note, level=i) for i, note in enumerate(MIXED)])
    read = OutcomeTable.read(path)
    assert read.frame["note"].tolist() == MIXED
    assert read.frame["level"].dtype == np.int64
    read.write(tmp_path / "again.jsonl")
    assert OutcomeTable.read(tmp_path / "again.jsonl").frame["note"].tolist() == MIXED


def test_a_column_of_several_types_is_refused_by_parquet_and_named(tmp_path):
    read = OutcomeTable.read(jsonl(tmp_path / "t.jsonl", [row(0, note=1), row(1, note="x")]))
    with pytest.raises(InvalidOutcomes, match=r"(?s)t\.parquet: cannot be written: .*note"):
        read.write(tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_table_that_no_file_can_hold_is_not_written(tmp_path, suffix):
    table = OutcomeTable(query_ids=("a",), prompts=(SURROGATE,), experts=("m",), scores=np.ones((1, 1)))
    with pytest.raises(InvalidOutcomes, match="cannot be written: .*surrogates not allowed"):
        table.write(tmp_path / f"t{suffix}")
    assert not list(tmp_path.iterdir())
