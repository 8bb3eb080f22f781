"""A question over a table described in the prompt -> one SQL query, judged by its result."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, lines, words

_QUESTIONS: Final = MappingProxyType(
    {
        "SELECT {c} FROM {t}": lines("""
            List every {c}.
            Show me the {c} of all entries.
            What {c} values do we have?
            Give me the {c} column.
            I want to see each {c}.
            Print the {c} of everything.
            Read out the {c} of each row.
            I need all the {c} values.
            Show the whole {c} column.
            What is the {c} of each entry?
            ---
            Which {c} values are stored?
            Fetch the {c} for every record.
            Only the {c}, but for all rows.
            Let me see the {c} of all {t}.
        """),
        "SELECT {c} FROM {t} WHERE {n} > {v}": lines("""
            Which {c} has a {n} over {v}?
            Show the {c} where {n} is greater than {v}.
            Give me each {c} with {n} above {v}.
            I need the {c} of those whose {n} is higher than {v}.
            Find every {c} with more than {v} for {n}.
            List the {c} if the {n} exceeds {v}.
            What {c} goes with a {n} bigger than {v}?
            For which {c} is the {n} more than {v}?
            Get the {c} of all with a {n} larger than {v}.
            Show me every {c} that has a {n} above {v}.
            ---
            Return the {c} wherever the {n} goes beyond {v}.
            With a {n} of more than {v}, which {c} is there?
            Pick out the {c} of all {t} whose {n} is over {v}.
            I only care about a {n} greater than {v}: show the {c}.
        """),
        "SELECT {c} FROM {t} WHERE {n} < {v}": lines("""
            Which {c} has a {n} under {v}?
            Show the {c} where {n} is less than {v}.
            Give me each {c} with {n} below {v}.
            I need the {c} of those whose {n} is smaller than {v}.
            Find every {c} with less than {v} for {n}.
            List the {c} if the {n} stays under {v}.
            What {c} goes with a {n} lower than {v}?
            For which {c} is the {n} less than {v}?
            Get the {c} of all with a {n} smaller than {v}.
            Show me every {c} that has a {n} below {v}.
            ---
            Return the {c} wherever the {n} does not reach {v}.
            With a {n} of less than {v}, which {c} is there?
            Pick out the {c} of all {t} whose {n} is under {v}.
            I only care about a {n} smaller than {v}: show the {c}.
        """),
        "SELECT {c} FROM {t} WHERE {x} = '{w}'": lines("""
            Which {c} has '{w}' as {x}?
            Show the {c} where {x} is '{w}'.
            Give me each {c} with the {x} '{w}'.
            I need the {c} of those whose {x} equals '{w}'.
            Find every {c} that has the {x} '{w}'.
            List the {c} if the {x} is '{w}'.
            What {c} goes with the {x} '{w}'?
            For which {c} is the {x} equal to '{w}'?
            Get the {c} of all with '{w}' for {x}.
            Show me every {c} whose {x} is '{w}'.
            ---
            Return the {c} wherever '{w}' is the {x}.
            With '{w}' as the {x}, which {c} is there?
            Pick out the {c} of all {t} that have '{w}' as {x}.
            I only care about the {x} '{w}': show the {c}.
        """),
        "SELECT COUNT(*) FROM {t}": lines("""
            How many entries are there?
            Count all the rows.
            What is the number of records?
            Tell me how many rows we have.
            How many records do I have in total?
            Give me the number of rows.
            How many {t} do we have?
            I want to know how many entries it holds.
            Count the {t}.
            What is the count of all entries?
            ---
            How many {t} are stored in total?
            How big is the table, in rows?
            Number of {t}, please.
            Work out how many records it has.
        """),
        "SELECT COUNT(*) FROM {t} WHERE {x} = '{w}'": lines("""
            How many have the {x} '{w}'?
            Count the rows where {x} is '{w}'.
            What is the number of entries with {x} '{w}'?
            In how many rows is the {x} '{w}'?
            Count those with '{w}' as {x}.
            Tell me how many {t} have '{w}' for {x}.
            How many {t} are there whose {x} is '{w}'?
            Give me the number of {t} with the {x} '{w}'.
            How many of the {t} have the {x} '{w}'?
            Count every entry that has '{w}' in {x}.
            ---
            For how many {t} is '{w}' the {x}?
            Number of {t} with '{w}' as their {x}, please.
            How often does '{w}' occur as {x}?
            Work out how many records have the {x} '{w}'.
        """),
        "SELECT MAX({n}) FROM {t}": lines("""
            What is the highest {n}?
            Tell me the largest {n}.
            Find the maximum {n}.
            How high does {n} go at most?
            Give me the biggest {n}.
            Which {n} is the greatest?
            I want the top {n} value.
            What's the maximum of {n}?
            Show the highest {n} of all.
            I need the largest value of {n}.
            ---
            Up to what value does the {n} go?
            The greatest {n} among the {t}, please.
            How large is the largest {n}?
            Return the peak value of {n}.
        """),
        "SELECT AVG({n}) FROM {t}": lines("""
            What is the average {n}?
            Tell me the mean {n}.
            Work out the average of {n}.
            What {n} do we have on average?
            Give me the mean of the {n} column.
            Compute the average {n}.
            On average, what is the {n}?
            I'd like the mean value of {n}.
            What's the mean {n} of all {t}?
            Find the average {n} of the {t}.
            ---
            The {n}, averaged over all {t}, please.
            How large is the {n} on average?
            Return the mean over the {n} values.
            What is a typical {n}, taken as the average?
        """),
        "SELECT SUM({n}) FROM {t}": lines("""
            What is the total {n}?
            Add up the {n} column.
            What does {n} sum to?
            Give me the sum of {n}.
            How much {n} is there in total?
            Tell me the {n} of all {t} added together.
            Compute the total of {n}.
            I need the sum over {n}.
            What is the {n} of all {t} in total?
            Sum up the {n} of the {t}.
            ---
            All the {n} values added up, please.
            How much is the {n} of all {t} combined?
            Return the overall sum of the {n} column.
            Put together, what {n} do the {t} have?
        """),
        "SELECT {c} FROM {t} ORDER BY {n} DESC LIMIT {k}": lines("""
            Which {k} have the highest {n}? Show the {c}.
            Top {k} by {n}, only the {c}.
            Give me the {c} of the {k} with the largest {n}.
            Show the {c} for the {k} highest {n}.
            I want the {c} of the {k} rows with the most {n}.
            List the {c} of the {k} {t} that lead in {n}.
            Name the {c} of the top {k} in {n}.
            What {c} do the {k} with the greatest {n} have?
            The {k} {t} with the biggest {n}: what is their {c}?
            Show the {c} of the top {k} {t} by {n}.
            ---
            Which {c} do the {k} {t} with the highest {n} have?
            Return the {c} of the {k} leaders in {n}.
            Rank by {n}, largest first, and show the {c} of the first {k}.
            I'd like to see the {k} {t} with the most {n}, just the {c}.
        """),
    }
)
_SCHEMAS = lines("""
    My table {t} has the columns {cols}. {q}
    We have a table {t} ({cols}). {q}
    {q} The table is {t} ({cols}).
    There is a table called {t} with {cols}. {q}
    I keep everything in a table {t} with the columns {cols}. {q}
    Table {t}, columns {cols}. {q}
    {q} It is all in the table {t}, which has {cols}.
    Given a table {t} with columns {cols}: {q}
    In the database there is a table {t} holding {cols}. {q}
    {q} We store it in a table {t} with the columns {cols}.
    ---
    Our data sits in the table {t} with {cols} as columns. {q}
    {q} For this use the table {t}, its columns are {cols}.
    The columns of my table {t} are {cols}. {q}
    I have one table, {t}, made up of {cols}. {q}
""")
_TABLES = words("""
    books films cars players cities hotels songs orders plants rivers workers games ships schools lakes products
    dogs shops flights museums recipes phones bridges houses races planets tools boats artists bikes clubs
    beaches courses wines trains teams stores parks chairs farms
    ---
    movies stations airports actors trees concerts rooms castles birds cameras villages laptops
""")
_TEXTS = words("""
    name title city color brand country owner type author region model genre status label style material street
    nation category team
    ---
    language surname maker flavor shape province director currency breed profession
""")
_NUMBERS = words("""
    price year age weight height score length rating size area speed stock depth budget salary width distance
    capacity points volume
    ---
    rank mileage population profit humidity quantity temperature duration fee voltage
""")
_VALUES = words("""
    Oslo red Smith gold Japan Berlin wood jazz Green north Madrid blue Brown Canada steel Paris rock silver
    Spain old Rome black glass India new London white Egypt pop small Peru open plastic Jones south
    ---
    Vienna orange copper Brazil round Dublin cotton blues Miller purple west Norway Lisbon folk
""")
_N_ROWS: Final = 12


@dataclass(frozen=True, slots=True)
class _Table:
    """A random table: `texts` and `numbers` are column names; `columns` is all of them in the order of the schema."""

    name: str
    texts: list[str]
    numbers: list[str]
    columns: list[str]
    values: list[str]


def _table(draw: Draw) -> _Table:
    texts, numbers = draw.picks(_TEXTS, 2), draw.picks(_NUMBERS, draw.rng.choice((1, 2)))
    columns = texts + numbers
    draw.rng.shuffle(columns)
    return _Table(draw.pick(_TABLES), texts, numbers, columns, draw.picks(_VALUES, 4))


def _creation(table: _Table, threshold: int, draw: Draw) -> str:
    """SQL that makes the table and fills it so that right and wrong queries differ.

    Numbers lie on both sides of `threshold` and have no ties; each text occurs in equally many rows.
    """
    numbers = draw.rng.sample(range(1, 2 * threshold + 100), _N_ROWS * len(table.columns))
    cells = {}
    for i, column in enumerate(table.columns):
        texts = [f"'{value}'" for value in table.values] * (_N_ROWS // len(table.values))
        cells[column] = texts if column in table.texts else list(map(str, numbers[i * _N_ROWS : (i + 1) * _N_ROWS]))
        draw.rng.shuffle(cells[column])
    kinds = ", ".join(f"{column} {'TEXT' if column in table.texts else 'INTEGER'}" for column in table.columns)
    rows = ", ".join(f"({', '.join(row)})" for row in zip(*cells.values(), strict=True))
    return f"CREATE TABLE {table.name} ({kinds}); INSERT INTO {table.name} VALUES {rows};"


def _make(draw: Draw) -> Row:
    table = _table(draw)
    query = draw.rng.choice(tuple(_QUESTIONS))
    threshold = draw.rng.randrange(2, 200) * 10
    slots = {
        "t": table.name,
        "c": table.texts[0],
        "x": table.texts[1],
        "n": table.numbers[0],
        "w": table.values[0],
        "v": threshold,
        "k": draw.rng.randrange(2, 10),
    }
    question = draw.pick(_QUESTIONS[query]).format(**slots)
    columns = f"{', '.join(table.columns[:-1])} and {table.columns[-1]}"
    prompt = draw.pick(_SCHEMAS).format(t=table.name, cols=columns, q=question)
    return Row(prompt, query.format(**slots), {"schema_sql": _creation(table, threshold, draw)})


SQL = Family(
    name="sql",
    about="a question over a table described in the prompt, to one SQL query",
    grader="sql",
    max_tokens=28,
    make=_make,
    pools={
        "schemas": _SCHEMAS,
        "tables": _TABLES,
        "texts": _TEXTS,
        "numbers": _NUMBERS,
        "values": _VALUES,
        **{f"questions_{i}": pool for i, pool in enumerate(_QUESTIONS.values())},
    },
)
