"""The rows of a training: JSON lines with a prompt and its right answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coe.errors import TaskError
from registry.documents import dotted, message_of
from registry.errors import SourceError
from registry.headers import check_regular
from registry.json_text import loads
from registry.spelling import mistyped

MOST_BYTES: Final = 2**30
MOST_ROWS: Final = 1_000_000
FEWEST_TRAIN: Final = 8
FEWEST_VALID: Final = 4
_MOST_PROBLEMS: Final = 20
_MOST_CHARACTERS: Final = 2**20


class _Line(BaseModel):
    """A line of the file; other fields are ignored. member, group, peers: as in `AnswerRow`."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(min_length=1, max_length=1000)]
    prompt: Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]
    answer: Annotated[str, Field(max_length=_MOST_CHARACTERS)]
    member: Annotated[str, Field(max_length=1000)] = ""
    group: Annotated[str, Field(max_length=1000)] = ""
    peers: Annotated[tuple[str, ...], Field(max_length=64)] | None = None

    @field_validator("id", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value

    @field_validator("answer")
    @classmethod
    def _is_not_empty(cls, answer: str) -> str:
        if not answer.strip():
            raise ValueError("is empty: the composition learns to give this answer")
        return answer


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A prompt, which is one user message, and the text that answers it.

    Attributes:
        place: such as `train.jsonl:12`.
        member: the member that this row is for, where a preset trains members on their own rows.
        group: of the members that are right for this row, where a preset reads one.
        peers: that leave notes on this row, for `notes` and `cache`; None: all. When served, a router chooses them.
    """

    id: str
    prompt: str
    answer: str
    place: str
    member: str = ""
    group: str = ""
    peers: tuple[str, ...] | None = None

    def among(self, peers: Iterable[str]) -> list[str]:
        """Those of the peers that leave notes on this row."""
        return [peer for peer in peers if self.peers is None or peer in self.peers]


def read_answer_rows(path: Path, *, fewest: int) -> tuple[AnswerRow, ...]:
    """Read a JSONL file; blank lines are skipped.

    Args:
        fewest: rows below which training makes no sense.

    Raises:
        TaskError: the file cannot be read, a line is wrong or an id is given twice, each with its line; too few rows.
    """
    problems, rows, lines = [], [], dict[str, int]()
    for number, text in enumerate(_lines(path), 1):
        place = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            fields = loads(text)
            line = _Line.model_validate(fields)
        except ValidationError as error:
            problems += [f"{place}: {problem}" for problem in _problems(error, fields)]
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: is not JSON: {error}")
            continue
        if line.id in lines:
            problems.append(f"{place}: id {line.id!r} is also that of line {lines[line.id]}")
        lines[line.id] = number
        rows.append(AnswerRow(line.id, line.prompt, line.answer, place, line.member, line.group, line.peers))
    if problems:
        more = f"\n... and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise TaskError("\n".join(problems[:_MOST_PROBLEMS]) + more)
    if not fewest <= len(rows) <= MOST_ROWS:
        raise TaskError(f"{path} has {len(rows)} rows; a training needs {fewest} to {MOST_ROWS:,}")
    return tuple(rows)


def check_apart(train: tuple[AnswerRow, ...], valid: tuple[AnswerRow, ...]) -> None:
    """Raises TaskError if a prompt of the validation rows is among the training rows: early stopping would not see."""
    known = {row.prompt: row.place for row in train}
    if same := [row for row in valid if row.prompt in known]:
        raise TaskError(
            f"{same[0].place}: the prompt is also that of {known[same[0].prompt]} ({len(same)} of {len(valid)} "
            "validation rows): validation rows must not be trained on"
        )


def rows_digest(rows: tuple[AnswerRow, ...]) -> str:
    """`sha256:...` over prompts, answers, members, groups and peers, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        for text in (row.prompt, row.answer, *filter(None, (row.member, row.group)), *(row.peers or ())):
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return f"sha256:{digest.hexdigest()}"


def _lines(path: Path) -> list[str]:
    try:
        if (size := check_regular(path)) > MOST_BYTES:
            raise TaskError(f"{path} has {size:,} bytes; the most is {MOST_BYTES:,}")
        return path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line ends
    except FileNotFoundError:
        raise TaskError(f"{path}: there is no such file") from None
    except (OSError, SourceError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error


def _problems(error: ValidationError, fields: Any) -> Iterator[str]:
    """What is wrong with a line, with a hint at a field that may be a mistyped one."""
    for detail in error.errors(include_url=False):
        where, message = dotted(detail["loc"]), message_of(detail, syntax="JSON")
        if detail["type"] == "missing":
            message += mistyped([where], (name for name in fields if name not in _Line.model_fields))
        yield f"{where}: {message}" if where else message
