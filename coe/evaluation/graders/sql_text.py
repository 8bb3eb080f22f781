"""What the text of a SQL query tells without running it: its first word, its order, copies of its table expressions.

This reads tokens only. A parser is the wrong tool for hostile text: sqlglot's takes exponential time in nested calls,
8.7 s for a query with 16 of them (docs/results.md), and cannot be interrupted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

_TOKEN = re.compile(
    r"""'(?:[^']|'')*+(?:'|\Z) | "(?:[^"]|"")*+(?:"|\Z) | `(?:[^`]|``)*+(?:`|\Z) | \[[^\]]*+(?:\]|\Z)  # strings, names
        | --[^\n]* | /\*.*?(?:\*/|\Z)                                  # comments
        | \w+ | \S""",
    re.VERBOSE | re.DOTALL,
)

_MAX_DEFINITIONS = 100


def first_word(query: str) -> str:
    """The first word after comments, in lower case."""
    return next(_tokens(query), "")


def has_outer_order(query: str) -> bool:
    """Whether the query itself (not a part in brackets) has an ORDER BY."""
    depth, before = 0, ""
    for token in _tokens(query):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0 and (before, token) == ("order", "by"):
            return True
        before = token
    return False


def cte_copies(query: str, most: int) -> int:
    """An upper bound of the copies of common table expressions that SQLite makes to prepare a query.

    Each mention is a copy: in a chain in which every expression mentions the one before twice, their number doubles at
    each link. SQLite before 3.41 cannot be interrupted while it prepares.

    Args:
        most: the largest bound that matters; above it the result is `most + 1`.
    """
    tokens = [_name(token) for token in _tokens(query)]
    definitions = list(islice(_cte_definitions(tokens), _MAX_DEFINITIONS + 1))
    if len(definitions) > _MAX_DEFINITIONS:
        return most + 1
    times_defined = Counter(name for name, _ in definitions)
    copies = dict.fromkeys(times_defined, 1)
    # A recursive mention is no copy; a mention in a body that hides an outer one of the same name is.
    mentions = [
        (name, Counter(t for t in body if t in copies and (t != name or times_defined[name] > 1)))
        for name, body in definitions
    ]
    for _ in definitions:
        for name, others in mentions:
            total = 1 + sum(copies[other] * times for other, times in others.items())
            copies[name] = min(max(copies[name], total), most + 1)
    return min(sum(copies[token] for token in tokens if token in copies), most + 1)


def _tokens(query: str) -> Iterator[str]:
    """Words and signs in lower case, without comments; strings and quoted names keep their quotes."""
    return (token.lower() for token in _TOKEN.findall(query) if not token.startswith(("--", "/*")))


def _name(token: str) -> str:
    """A token without quotes: SQLite reads a string as a name where a name is expected."""
    return token[1:-1] if len(token) > 1 and token[0] in "'\"`[" else token


def _cte_definitions(tokens: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and body of each `name [(columns)] AS [[NOT] MATERIALIZED] (body)`."""
    for position, token in enumerate(tokens):
        if token != "as" or position == 0:
            continue
        name_at, opening = position - 1, position + 1
        while tokens[opening : opening + 1] in (["not"], ["materialized"]):
            opening += 1
        if tokens[opening : opening + 1] != ["("]:
            continue
        if tokens[name_at] == ")":
            name_at = _matching(tokens, name_at, -1) - 1
        if name_at >= 0:
            yield tokens[name_at], tokens[opening + 1 : _matching(tokens, opening, 1)]


def _matching(tokens: list[str], position: int, step: int) -> int:
    """Where the bracket at `position` is closed (step 1) or was opened (step -1); past the end if nowhere."""
    depth = 0
    while 0 <= position < len(tokens):
        depth += {"(": step, ")": -step}.get(tokens[position], 0)
        if depth == 0:
            break
        position += step
    return position
