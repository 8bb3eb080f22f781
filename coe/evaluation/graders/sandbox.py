"""Untrusted SQL on an in-memory SQLite: reads only, within bounds of work, time and size.

The authorizer admits SELECT, reading the schema's own tables and views, and functions known to be harmless; a progress
handler bounds the work; value and statement sizes are bounded by the connection's limits, widths of `printf` by a check
of its format.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

from coe.evaluation.graders.sql_text import cte_copies, first_word

Rows = list[tuple[object, ...]]

MAX_STEPS = 2_000_000
"""SQLite instructions of one query at most; a query over thousands of rows takes some ten thousand."""
MAX_SECONDS = 5.0
"""A second bound, for slow instructions; far above what MAX_STEPS usually take."""
MAX_ROWS = 10_000
MAX_VALUE_BYTES = 20_000
MAX_RESULT_BYTES = 2_000_000
MAX_QUERY_CHARS = 20_000
MAX_CTE_COPIES = 5_000
MAX_SCHEMA_VALUE_BYTES = 10_000_000
MAX_WIDTH = 20_000
"""Largest width or precision in a format of `printf`: SQLite pads to it within one instruction, limits or not."""
_STEPS_A_CHECK = 200

# Without random*, zeroblob and load_extension: no function that varies, reaches outside, or allocates without bound, as
# json_group_array does past the limit of a value's size.
_FUNCTIONS = frozenset(
    re.findall(
        r"\S+",
        """-> ->> abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling char coalesce concat concat_ws cos cosh
        count cume_dist date datetime degrees dense_rank exp first_value floor format glob group_concat hex ifnull iif
        instr json json_array json_array_length json_extract json_object json_quote
        json_type json_valid julianday lag last_value lead length like likelihood likely ln log log10 log2 lower ltrim
        max min mod nth_value ntile nullif octet_length percent_rank pi pow power printf quote radians rank replace
        round row_number rtrim sign sin sinh soundex sqrt strftime string_agg substr substring sum tan tanh time
        timediff total trim trunc typeof unicode unixepoch unlikely upper""",
    )
)
# A schema must not touch files, settings or code.
_DENIED_TO_SCHEMAS = frozenset(
    {
        sqlite3.SQLITE_ATTACH,  # VACUUM INTO is one, too
        sqlite3.SQLITE_DETACH,
        sqlite3.SQLITE_PRAGMA,
        sqlite3.SQLITE_CREATE_VTABLE,
        sqlite3.SQLITE_DROP_VTABLE,
    }
)
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_QUERY_CHARS,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 10,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_PLACE = re.compile(r"%([^a-zA-Z%]*+)[lh]*+([a-zA-Z%])")
_WIDTH = re.compile(r"\d+")


# The sqlite3 module raises sqlite3.Warning for misuse in some versions, and ValueError for text that is not UTF-8.
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError)


class QueryError(Exception):
    """A query failed, does what is not allowed, or exceeded a bound."""


@contextmanager
def database(schema_sql: str) -> Iterator[sqlite3.Connection]:
    """A new in-memory database built by a script of CREATE and INSERT statements, ready for `select`.

    Raises:
        QueryError: the script fails, or reaches outside the database.
    """
    with closing(_memory()) as connection, closing(_memory()) as formatter:
        connection.set_authorizer(_schema_authorizer)
        for one in (connection, formatter):
            one.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_SCHEMA_VALUE_BYTES)
        for name in ("printf", "format"):
            connection.create_function(name, -1, partial(_formatted, formatter), deterministic=True)
        _bound_work(connection)
        try:
            connection.executescript(schema_sql)
        except _FAILURES as error:
            raise QueryError(f"the schema fails: {error}") from error
        readable = frozenset(name for (name,) in connection.execute("SELECT name FROM sqlite_master"))
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.set_authorizer(_Reader(readable))
        yield connection


def select(connection: sqlite3.Connection, query: str, max_rows: int = MAX_ROWS) -> Rows:
    """The rows of one SELECT.

    Raises:
        QueryError: the query fails, is no SELECT, reads what it may not, or exceeds `max_rows` or another bound.
    """
    if first_word(query[:MAX_QUERY_CHARS]) not in ("select", "with", "values"):
        raise QueryError("not a SELECT")
    if len(query) > MAX_QUERY_CHARS or cte_copies(query, MAX_CTE_COPIES) > MAX_CTE_COPIES:
        raise QueryError("the query is too large")
    _bound_work(connection)
    rows: Rows = []
    size_bytes = 0
    try:
        for row in connection.execute(query):
            rows.append(row)
            size_bytes += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > max_rows or size_bytes > MAX_RESULT_BYTES:
                raise QueryError(f"the result is larger than {max_rows} rows or {MAX_RESULT_BYTES} bytes")
    except _FAILURES as error:
        raise QueryError(str(error)) from error
    return rows


def _memory() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


def _formatted(formatter: sqlite3.Connection, *arguments: object) -> str | None:
    """SQLite's `printf`, evaluated by another connection once the widths in its format are checked.

    Raises:
        ValueError: a width or precision above MAX_WIDTH, in the format or as an argument.
    """
    template, position = arguments[0] if arguments else None, 1
    for flags, conversion in _PLACE.findall(template if isinstance(template, str) else ""):
        widths: list[object] = list(_WIDTH.findall(flags))
        stars = flags.count("*")
        widths += arguments[position : position + stars]
        for width in widths:
            [number] = formatter.execute("SELECT abs(CAST(? AS INTEGER))", (width,)).fetchone()
            if (number or 0) > MAX_WIDTH:
                raise ValueError(f"a width above {MAX_WIDTH}")
        position += stars + (conversion not in "%n")
    holes = ", ".join("?" * len(arguments))
    [value] = formatter.execute(f"SELECT printf({holes})", arguments).fetchone()
    return None if value is None else str(value)


def _schema_authorizer(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_DENY if action in _DENIED_TO_SCHEMAS else sqlite3.SQLITE_OK


class _Reader:
    """Authorizer that admits reading the named tables and views, and nothing else."""

    def __init__(self, readable: frozenset[str]) -> None:
        self._readable = readable

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        allowed = (
            action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
            # Without a column, rows are only counted, and the table may be an expression that the schema does not name.
            or (action == sqlite3.SQLITE_READ and (first in self._readable or not second))
            or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _bound_work(connection: sqlite3.Connection) -> None:
    """Interrupt the connection after MAX_STEPS instructions or MAX_SECONDS from now."""
    checks, deadline = 0, time.monotonic() + MAX_SECONDS

    def is_over() -> bool:
        nonlocal checks
        checks += 1
        return checks * _STEPS_A_CHECK > MAX_STEPS or time.monotonic() > deadline

    connection.set_progress_handler(is_over, _STEPS_A_CHECK)
