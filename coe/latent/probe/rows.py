"""Labelled rows, one JSON object a line, and the wordings in which an expert reads them.

{"word": "nabox", "label": "7"}                                          with the template '{word} = '
{"prompt": "Where is my parcel?", "label": "delivery"}                   the field `prompt`, if no wording is stated
{"prompt": "Is nabox larger than zot?", "label": "7", "word": "nabox"}   `word` or `span`: what the label is about

The label is the field `label`, else `answer`. Rows with the same `group` are in one fold; without it, those with the
same `word`, `prompt`, or text of the first wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

from coe.errors import TaskError
from coe.latent.prompts import Prompt
from registry.errors import SourceError
from registry.headers import check_regular
from registry.json_text import loads
from registry.spelling import listing, mistyped
from registry.yaml_loader import shortened

MOST_ROWS: Final = 5_000
"""Rows of a file that are read; `limit` takes the first ones of a longer file."""
MOST_LINE_BYTES: Final = 2**20
"""Size of a line."""
MOST_BYTES: Final = 64 * 2**20
"""Size of all lines that are read."""
MOST_TEXT: Final = 2**20
"""Characters of the text that a wording makes of a row."""
MOST_CHARACTERS: Final = 200
"""Length of a label."""
_MOST_PROBLEMS: Final = 20
_FIELD: Final = re.compile(r"\{(\w+)\}")
_LABELS: Final = ("label", "answer")
_FIELDS: Final = (*_LABELS, "prompt", "word", "span", "group")
"""Fields with a meaning of their own."""
_MOST_FIELDS: Final = 8
"""Fields of a row that a message lists."""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row of the file.

    Attributes:
        place: file and line, for messages.
        fields: the JSON object.
        label: what a probe predicts. answer: what the expert should answer: the field `answer`, else the label.
        group: rows of one group are in one fold; empty if the row has no `group`, `word` or `prompt`.
    """

    place: str
    fields: Mapping[str, Any]
    label: str
    answer: str
    group: str


@dataclass(frozen=True, slots=True)
class Wording:
    """How the rows are put to the expert: a text in which `{name}` is replaced by a field of the row."""

    template: str

    @classmethod
    def of_column(cls, name: str) -> Wording:
        """The field `name` of each row, as it is."""
        return cls("{" + name + "}")

    def prompt(self, row: LabelledRow) -> Prompt:
        """The text for a row; its span is the row's `span`, or its `word` where the text has it as a whole word.

        Raises:
            TaskError: the row lacks a field, or the text is empty.
        """
        text, places = self._filled(row)
        if not text.strip():
            raise TaskError(f"{row.place}: the wording {self.template!r} gives an empty text")
        return Prompt(text, self._span(row, text, places), name=row.place)

    def _filled(self, row: LabelledRow) -> tuple[str, dict[str, tuple[int, int]]]:
        """The text, and the characters at which each field stands."""
        parts: list[str] = []
        places: dict[str, tuple[int, int]] = {}
        length = end = 0
        for found in _FIELD.finditer(self.template):
            value = _text(row, found[1])
            before = self.template[end : found.start()]
            if length + len(before) + len(value) > MOST_TEXT:
                raise TaskError(f"{row.place}: the wording gives a text of more than {MOST_TEXT:,} characters")
            parts += [before, value]
            places[found[1]] = (length + len(before), length + len(before) + len(value))
            length, end = length + len(before) + len(value), found.end()
        return "".join([*parts, self.template[end:]]), places

    def _span(self, row: LabelledRow, text: str, places: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
        if "word" in places:
            return places["word"]
        if "span" in row.fields and "prompt" in places:
            start, end = _span_of(row)
            shift = places["prompt"][0]
            return start + shift, end + shift
        if "word" not in row.fields:
            return None
        word = _text(row, "word")
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
        return None if found is None else found.span()


def read_rows(path: Path, *, label: str | None = None, limit: int | None = None) -> list[LabelledRow]:
    """The labelled rows of a JSONL file.

    Args:
        label: field with the label; by default `label`, else `answer`.
        limit: most rows to take, from the start.

    Raises:
        TaskError: with every problem, each at its line; or more than MOST_ROWS rows or MOST_BYTES are to be read.
    """
    rows: list[LabelledRow] = []
    problems: list[str] = []
    for place, line in _lines(path):
        if len(rows) == MOST_ROWS:
            raise TaskError(f"{path}: more than {MOST_ROWS:,} rows; --limit {MOST_ROWS} reads the first ones")
        try:
            rows.append(_row(place, line, label))
            if len(rows) == limit:
                break
        except TaskError as error:
            problems.append(str(error))
            if len(problems) == _MOST_PROBLEMS:
                break
    if problems:
        raise TaskError("\n".join(problems))
    if not rows:
        raise TaskError(f"{path}: there are no rows in it")
    return rows


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """File and line number, and content, of the lines that are not blank."""
    try:
        check_regular(path)
    except SourceError as error:
        raise TaskError(str(error)) from error
    with path.open("rb") as file:
        number = n_bytes = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise TaskError(f"{path}:{number}: the line has more than {MOST_LINE_BYTES:,} bytes")
            n_bytes += len(line)
            if n_bytes > MOST_BYTES:
                raise TaskError(f"{path}:{number}: the rows so far have more than {MOST_BYTES:,} bytes; use --limit")
            if line.strip():
                yield f"{path}:{number}", line


def _row(place: str, line: bytes, label: str | None) -> LabelledRow:
    try:
        fields = loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TaskError(f"{place}: it is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TaskError(f"{place}: it is not a JSON object")
    name = label or next((each for each in _LABELS if each in fields), None)
    if name is None:
        raise TaskError(f"{place}: {_lacks(fields, _LABELS)}")
    row = LabelledRow(place, fields, "", "", "")
    value = _text(row, name).strip()
    if not value:
        raise TaskError(f"{place}: {name!r} is empty")
    if len(value) > MOST_CHARACTERS:
        raise TaskError(
            f"{place}: the label {name!r} has {len(value):,} characters; a label has at most {MOST_CHARACTERS}"
        )
    if "span" in fields:
        _span_of(row)
    answer = _text(row, "answer").strip() if "answer" in fields else value
    if not answer:
        raise TaskError(f"{place}: 'answer' is empty: state what the expert should answer, or leave it out")
    group = next((f"{each} {_text(row, each)}" for each in ("group", "word", "prompt") if each in fields), "")
    return LabelledRow(place, fields, value, answer, group.strip())


def _text(row: LabelledRow, name: str) -> str:
    """A field as text: a string or a number."""
    value = row.fields.get(name)
    if value is None:
        raise TaskError(f"{row.place}: {_lacks(row.fields, [name])}")
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise TaskError(f"{row.place}: {name!r} must be a text or a number, not {type(value).__name__}")
    if isinstance(value, float) and not isfinite(value):
        raise TaskError(f"{row.place}: {name!r} is not a finite number, but {value}: leave it out, or quote it in JSON")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TaskError(f"{row.place}: {name!r} is not Unicode text: it has half of a surrogate pair") from None
    return text


def _lacks(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The message about a row that has none of these fields."""
    some = listing((shortened(each) for each in fields), most=_MOST_FIELDS)
    hint = mistyped(names, (each for each in fields if each not in _FIELDS))
    return f"there is no field {' or '.join(map(shortened, names))}; the row has {some or 'none'}{hint}"


def _span_of(row: LabelledRow) -> tuple[int, int]:
    """The row's `span`: characters [start, end) of its `prompt`."""
    span, prompt = row.fields["span"], row.fields.get("prompt")
    length = len(prompt) if isinstance(prompt, str) else 0
    whole = isinstance(span, Sequence) and len(span) == 2 and all(type(each) is int for each in span)
    if not whole or not 0 <= span[0] < span[1] <= length:
        raise TaskError(
            f"{row.place}: `span` must be [start, end] with 0 <= start < end <= {length}, the length of `prompt`"
        )
    return span[0], span[1]
