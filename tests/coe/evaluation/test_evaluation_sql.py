"""The SQL grader: equal results are correct, whatever the query; no query can do harm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coe.evaluation.graders import GoldError
from coe.evaluation.graders.sandbox import MAX_SCHEMA_VALUE_BYTES, MAX_WIDTH, QueryError, database, select
from coe.evaluation.graders.sql import SqlResult
from coe.evaluation.graders.sql_text import cte_copies, has_outer_order

SCHEMA = """
CREATE TABLE city (name TEXT, country TEXT, people INTEGER, area REAL);
INSERT INTO city VALUES ('Rome', 'Italy', 2800, 1285.3), ('Milan', 'Italy', 1400, 181.8),
                        ('Paris', 'France', 2100, 105.4), ('Lyon', 'France', 520, 47.9), ('Oslo', 'Norway', 700, NULL);
CREATE VIEW big AS SELECT name FROM city WHERE people > 2000;
"""


def grade(answer: str, gold: str, **options: float) -> float:
    return SqlResult(**options).grade(answer, {"answer": gold, "schema_sql": SCHEMA})


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM city WHERE country = 'Italy'",
        "select c.name as n from city c where c.country like 'italy' order by n desc;",
        "```sql\nSELECT name FROM city WHERE country = 'Italy';\n```",
        "WITH i AS (SELECT * FROM city WHERE country = 'Italy') SELECT name FROM i",
        "VALUES ('Milan'), ('Rome')",
        "SELECT name FROM city GROUP BY name HAVING max(country) = 'Italy' -- both",
        "-- cities of Italy\n/* with no order */ SELECT name FROM city WHERE country = 'Italy'",
    ],
)
def test_another_query_with_the_same_result_is_right(answer: str) -> None:
    assert grade(answer, "SELECT name FROM city WHERE country = 'Italy'") == 1


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM city WHERE country = 'France'",
        "SELECT name FROM city",
        "SELECT name FROM city WHERE name = 'Rome'",
        "SELECT name, name FROM city WHERE country = 'Italy'",
        "SELECT 'Rome' UNION ALL SELECT 'Rome'",
        "SELECT nome FROM city",
        "SELECT name FROM citta",
        "SELECT name FROM city WHERE",
        "Rome and Milan",
        "",
        ";",
        "-- nothing",
    ],
)
def test_another_result_or_no_query_is_wrong(answer: str) -> None:
    assert grade(answer, "SELECT name FROM city WHERE country = 'Italy'") == 0


def test_order_counts_only_where_the_right_query_orders() -> None:
    up, down = "SELECT name FROM city ORDER BY people", "SELECT name FROM city ORDER BY people DESC"
    assert grade(up, up) == 1
    assert grade(down, up) == 0
    assert grade(down, "SELECT name FROM city") == 1
    assert grade(down, "SELECT name FROM (SELECT * FROM city ORDER BY people)") == 1


def test_values_are_compared_by_meaning() -> None:
    assert grade("SELECT 0.1 + 0.2", "SELECT 0.3") == 1
    assert grade("SELECT 2.0", "SELECT 2") == 1
    assert grade("SELECT '2'", "SELECT 2") == 0
    assert grade("SELECT NULL", "SELECT 0") == 0
    assert grade("SELECT 2.001", "SELECT 2.0") == 0
    assert grade("SELECT 2.001", "SELECT 2.0", tolerance=0.01) == 1
    assert grade("SELECT NULL, x'00'", "SELECT NULL, x'00'") == 1
    # Rounding sorts these rows differently; they are still equal.
    assert grade("VALUES (1.0, 'b'), (1.0000000001, 'a')", "VALUES (1.0000000001, 'b'), (1.0, 'a')") == 1
    assert grade("VALUES (1.0, 'b'), (1.0, 'b')", "VALUES (1.0, 'b'), (1.0, 'a')") == 0


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t -- order by", False),
        ('SELECT "order by" FROM t /* order by */', False),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
    ],
)
def test_outermost_order_by(query: str, ordered: bool) -> None:
    assert has_outer_order(query) is ordered


HOSTILE = {
    "write": "INSERT INTO city VALUES ('x', 'x', 1, 1)",
    "write behind WITH": "WITH x AS (SELECT 1) INSERT INTO city SELECT 'x', 'x', 1, 1",
    "delete": "DELETE FROM city",
    "drop": "DROP TABLE city",
    "create": "CREATE TABLE t AS SELECT 1",
    "second statement": "SELECT 1; DELETE FROM city",
    "second select": "SELECT 1; SELECT 1",
    "behind a comment": "/* */ DELETE FROM city",
    "attach": "ATTACH '{path}' AS other",
    "vacuum into": "VACUUM INTO '{path}'",
    "pragma": "PRAGMA table_info(city)",
    "pragma function": "SELECT * FROM pragma_table_info('city')",
    "schema table": "SELECT name FROM sqlite_master",
    "explain": "EXPLAIN SELECT 1",
    "explain behind a comment": "/* SELECT */ -- SELECT\nEXPLAIN SELECT 1",
    "nested calls that a parser reads in exponential time": "SELECT 1 FROM " + "DATE (" * 24 + "1" + ")" * 24,
    "extension": "SELECT load_extension('{path}')",
    "tokenizer": "SELECT fts3_tokenizer('simple')",
    "writefile": "SELECT writefile('{path}', 'x')",
    "random": "SELECT random()",
    "random blob": "SELECT length(randomblob(1000000000))",
    "zero blob": "SELECT length(zeroblob(1000000000))",
    "wide format": "SELECT length(printf('%19000d', 1) || printf('%19000d', 1))",
    "long value": "SELECT length(replace(hex(char(1)), '0', hex(printf('%019000d', 1))))",
    "endless recursion": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
    "endless rows": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
    "growing value": "WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM r) SELECT max(length(s)) FROM r",
    "json aggregate": "SELECT json_group_array(name) FROM city",
    "cross join": "SELECT count(*) FROM " + ", ".join(f"city c{i}" for i in range(20)),
    "deep expression": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "many columns": "SELECT " + ", ".join(["1"] * 3000),
    "long query": "SELECT '" + "x" * 30_000 + "'",
    "lone surrogate": "SELECT '\ud800'",
    "null character": "SELECT 1\0",
    "precision of a character": "SELECT printf('%.*c', 1000000000, 'x')",
    "precision, as format()": "SELECT format('%.*c', 1000000000, 'x')",
    "precision in the format": "SELECT printf('%.1000000000c', 'x')",
    "width as an argument": "SELECT printf('%*d', 1000000000, 1)",
    "width as text": "SELECT printf('%*d', '1000000000', 1)",
    "negative width": "SELECT printf('%-*d', -1000000000, 1)",
    "precision of a float": "SELECT printf('%.*f', 100000000, 1.5)",
    "format made by the query": "SELECT printf('%.' || '1000000000c', 'x')",
    "unclosed brackets": "SELECT " + "[ " * 9000,
    "nested expressions": "WITH a AS (" * 99 + "SELECT 1" + ") SELECT 1 FROM a" * 99,
    "words like definitions": "SELECT " + "as ) " * 3900,
    "not UTF-8": "SELECT CAST(x'ff' AS TEXT)",
    "parameter": "SELECT ?",
    "integer overflow": "SELECT sum(9223372036854775807) FROM city",
}


@pytest.mark.parametrize("query", HOSTILE.values(), ids=HOSTILE)
def test_hostile_queries_are_refused_soon(query: str, tmp_path: Path) -> None:
    target = tmp_path / "written"
    started = time.monotonic()
    with database(SCHEMA) as connection:
        with pytest.raises(QueryError):
            select(connection, query.replace("{path}", str(target)))
        assert select(connection, "SELECT count(*) FROM city") == [(5,)]
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def doubling(links: int, name: str = "a{}") -> str:
    parts = [f"{name.format(i + 1)} AS (SELECT p.x FROM {name.format(i)} p, {name.format(i)} q)" for i in range(links)]
    return f"WITH {name.format(0)} AS (SELECT 1 x), {', '.join(parts)} SELECT count(*) FROM {name.format(links)}"


@pytest.mark.parametrize("name", ["a{}", '"a {}"', "`a{}`", "[a b{}]", "'a{}'"])
def test_doubling_expressions_are_refused_before_they_are_prepared(name: str) -> None:
    started = time.monotonic()
    with database(SCHEMA) as connection, pytest.raises(QueryError, match="too large"):
        select(connection, doubling(40, name))
    assert time.monotonic() - started < 1


def test_expression_copies_are_bounded_whatever_hides_them() -> None:
    nested = "SELECT 1 x"
    for _ in range(20):
        nested = f"WITH a(x) AS ({nested}) SELECT p.x FROM a p, a q"
    many = "WITH " + ", ".join(f"c{i} AS NOT MATERIALIZED (SELECT 1)" for i in range(200)) + " SELECT 1"
    assert cte_copies(nested, 5000) == 5001
    assert cte_copies(many, 5000) == 5001
    assert cte_copies("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT * FROM r", 5000) < 10
    assert cte_copies("SELECT as ) as ( as", 5000) < 10
    with database(SCHEMA) as connection:
        assert select(connection, doubling(4)) == [(1,)]


def test_formats_are_those_of_sqlite() -> None:
    query = "SELECT printf('%*s|%-5s|%05.2f|%lld%%', 6, 'ab', 'c', 3.14159, 7), format('%d', 3), printf(NULL)"
    with database(SCHEMA) as connection:
        assert select(connection, query) == [("    ab|c    |03.14|7%", "3", None)]
        assert select(connection, f"SELECT length(printf('%{MAX_WIDTH - 1}d', 1))") == [(MAX_WIDTH - 1,)]
        with pytest.raises(QueryError):
            select(connection, f"SELECT printf('%{MAX_WIDTH + 1}d', 1)")


@pytest.mark.parametrize(
    "answer",
    [
        "-- list\nSELECT name FROM city",
        "/* c */ SELECT name FROM city",
        "-- it's\n-- two\n  SELECT name FROM city; -- end",
        "\ufeffSELECT name FROM city",
        "```sql\n-- list\nSELECT name FROM city;\n```",
        "Here is the query:\n```sql\nSELECT name FROM city\n```\nIt lists all cities.",
        "<think>SELECT 1?</think>\nSELECT name FROM city",
    ],
)
def test_a_query_after_comments_or_in_a_code_block_is_read_as_answer_and_as_gold(answer: str) -> None:
    assert grade(answer, "SELECT name FROM city") == 1
    if "<think>" not in answer:  # a right answer has no thoughts
        assert grade("SELECT name FROM city", answer) == 1


def test_rows_that_rounding_sorts_apart_are_matched_within_a_bound() -> None:
    many = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 3000) SELECT {} FROM r"
    started = time.monotonic()
    assert grade(many.format("1.0 + n * 7919 % 3000 / 1e11, 'k' || n"), many.format("1.0, 'k' || n")) == 1
    grade(many.format("1.0 + (n * 7919) % 3000 / 1e11"), many.format("1.0 + n / 1e4"))
    assert time.monotonic() - started < 20


def test_ordinary_features_are_allowed() -> None:
    with database(SCHEMA) as connection:
        assert select(connection, "SELECT name FROM big ORDER BY name") == [("Paris",), ("Rome",)]
        recursive = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 100) SELECT sum(n) FROM r"
        assert select(connection, recursive) == [(5050,)]
        window = (
            "SELECT name, rank() OVER (PARTITION BY country ORDER BY people DESC) FROM city WHERE country = 'Italy'"
        )
        assert sorted(select(connection, window)) == [("Milan", 2), ("Rome", 1)]
        text = "SELECT upper(substr(name, 1, 2)) || '-' || printf('%.1f', round(area)) FROM city WHERE name = 'Lyon'"
        assert select(connection, text) == [("LY-48.0",)]
        assert select(connection, "SELECT strftime('%Y', '2024-02-03'), coalesce(NULL, 2)") == [("2024", 2)]


def test_results_are_bounded() -> None:
    with database(SCHEMA) as connection:
        with pytest.raises(QueryError, match="larger than 3 rows"):
            select(connection, "SELECT name FROM city", max_rows=3)
        wide = "SELECT " + ", ".join(["printf('%019000d', 1)"] * 150)
        with pytest.raises(QueryError, match="bytes"):
            select(connection, wide)


def test_values_of_a_schema_are_bounded() -> None:
    for size, fits in ((MAX_SCHEMA_VALUE_BYTES - 100, True), (MAX_SCHEMA_VALUE_BYTES + 1, False)):
        script = f"CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob({size}));"
        if fits:
            with database(script) as connection:
                assert select(connection, "SELECT count(*) FROM t") == [(1,)]
        else:
            with pytest.raises(QueryError, match="schema"), database(script):
                pass


@pytest.mark.parametrize(
    "script", ["ATTACH '{path}' AS x", "VACUUM INTO '{path}'", "CREATE TABLE", "PRAGMA user_version = 3"]
)
def test_a_schema_cannot_reach_outside(script: str, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="schema"), database(script.replace("{path}", str(tmp_path / "f"))):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "SELECT nothing FROM city", "schema_sql": SCHEMA},
        {"answer": "DELETE FROM city", "schema_sql": SCHEMA},
        {"answer": "SELECT 1", "schema_sql": "CREATE TABLE"},
        {"answer": "SELECT 1"},
        {"answer": 1, "schema_sql": SCHEMA},
    ],
)
def test_a_broken_right_query_is_the_task_s_fault(row: dict[str, object]) -> None:
    with pytest.raises(GoldError):
        SqlResult().grade("SELECT 1", row)
