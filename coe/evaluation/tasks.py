"""Tasks: questions with right answers, as a JSONL file and a small YAML. Adding one needs no code.

    # capitals.yaml                                # capitals.jsonl, one object a line
    name: capitals                                 {"id": "fr", "prompt": "Capital of France?", "answer": "Paris"}
    data: capitals.jsonl                           {"id": "jp", "messages": [{"role": "user", ...}], "answer": ...}
    grader: contains
    domain: geography

A row has an `id`, a `prompt` or `messages`, the right `answer`, and what else its grader reads, such as `schema_sql`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coe.errors import TaskError
from coe.evaluation.digest import json_digest
from coe.evaluation.graders import GoldError, Grader, GraderModel, grader_class, score_of
from coe.protocol.table_values import is_nan, text_id
from registry.documents import Document, dotted, load_document, message_of, validate
from registry.errors import InvalidSpec, PluginError, SourceError
from registry.headers import check_regular
from registry.json_text import LongNumber, loads
from registry.spelling import did_you_mean
from routers.base import Message

_SHOWN_PROBLEMS = 20
_Text = Annotated[str, Field(min_length=1)]


class TaskFile(BaseModel):
    """The YAML of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the task."""
    data: Path
    """JSONL file with the rows, relative to this file."""
    grader: str
    """How an answer is scored: a grader's name, one of a plug-in, or `module:Class`."""
    grader_options: dict[str, Any] = {}
    """Settings of the grader."""
    domain: _Text | None = None
    """The category that routers learn from; null takes the task's name."""
    description: str = ""
    """One line on what it asks."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Most new tokens of an answer."""
    stop: tuple[_Text, ...] = ()
    """An answer ends before the first of these strings."""
    system: _Text | None = None
    """System message of every row that has none of its own."""
    licence: str | None = Field(None, validation_alias=AliasChoices("licence", "license"))
    """Licence of the rows."""


class MessageLine(BaseModel):
    """One message of a row's conversation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    role: str = Field(pattern="^(system|user|assistant|tool)$")
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    """Its text."""


class RowLine(BaseModel):
    """One row of a task's JSONL file; other fields are the grader's."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """Unique in the file; a whole number is taken as its text, `1` for 1 and 1.0."""
    prompt: _Text | None = None
    """The question, as one user message."""
    messages: Annotated[list[MessageLine], Field(min_length=1)] | None = None
    """A conversation that ends with the question, in place of `prompt`."""
    answer: Any
    """The right answer, in the form that the grader reads."""

    @field_validator("id", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if (name := text_id(value)) is None:
            raise ValueError("is missing")
        return name

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        if self.messages and not any(turn.role == "user" for turn in self.messages):
            raise ValueError("`messages` has no user message")
        return self


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question. `fields` is the whole JSON object, which the grader reads."""

    id: str
    messages: tuple[Message, ...]
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def prompt(self) -> str:
        """The last user message, which is what a router reads of this row."""
        return next(message.content for message in reversed(self.messages) if message.role == "user")


@dataclass(frozen=True, slots=True)
class Task:
    """Rows, how to ask them, and how to grade the answers."""

    name: str
    domain: str
    rows: tuple[TaskRow, ...] = field(repr=False)
    grader: Grader
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    digest: str = ""

    def head(self, limit: int | None) -> Task:
        """The task with its first `limit` rows; all of them for None."""
        return self if limit is None else replace(self, rows=self.rows[:limit])


def load_task(path: Path) -> Task:
    """Read a task's YAML and its data, and check every right answer with the grader.

    Raises:
        TaskError: with every problem, each at its file and line.
    """
    try:
        document = load_document(path)
        spec = validate(document, TaskFile)
        grader = _grader(document, spec)
    except InvalidSpec as error:
        raise TaskError(str(error)) from error
    data = document.folder / spec.data.expanduser()
    rows = _read_rows(data, spec, grader, named_in=document.place(("data",)))
    return Task(
        name=spec.name,
        domain=spec.domain or spec.name,
        rows=rows,
        grader=grader,
        max_tokens=spec.max_tokens,
        stop=spec.stop,
        digest=_digest(spec, grader, rows),
    )


def find_tasks(names: str, folders: Sequence[Path]) -> list[Task]:
    """The tasks that `names` lists, comma-separated: names (of a YAML in `folders`), YAML files, folders of them.

    Raises:
        TaskError: one is unknown (with close matches), or two have the same name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise TaskError("no task is named: give names, YAML files or a folder of them")
    paths = list(dict.fromkeys(path for name in wanted for path in _paths(name, folders)))
    tasks: dict[str, tuple[Task, Path]] = {}
    for path in paths:
        task = load_task(path)
        if task.name in tasks:
            raise TaskError(f"{path}: name {task.name!r} is also that of {tasks[task.name][1]}: rename one")
        tasks[task.name] = (task, path)
    return [task for task, _ in tasks.values()]


def _paths(name: str, folders: Sequence[Path]) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = _yaml_files(path)
        if not found:
            raise TaskError(f"{path}: there is no task (*.yaml) in this folder")
        return found
    if path.suffix in (".yaml", ".yml"):
        return [path]
    known = {file.stem: file for folder in reversed(folders) for file in _yaml_files(folder)}
    if name in known:
        return [known[name]]
    hint = did_you_mean(name, known, most=3, listed=True)
    raise TaskError(f"no task {name!r} in {', '.join(map(str, folders)) or 'any folder'}{hint}")


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.y*ml") if path.suffix in (".yaml", ".yml"))


def _grader(document: Document, spec: TaskFile) -> GraderModel:
    try:
        model = grader_class(spec.grader)
    except PluginError as error:
        raise InvalidSpec([document.problem(("grader",), str(error))]) from error
    return validate(document, model, ("grader_options",)) if spec.grader_options else model()


def _read_rows(data: Path, spec: TaskFile, grader: Grader, *, named_in: str) -> tuple[TaskRow, ...]:
    try:
        check_regular(data)  # opening a pipe may wait for ever
        text = data.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(f"{named_in}: there is no such file: {data}") from None
    except SourceError as error:
        raise TaskError(f"{named_in}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{data}: cannot be read: {error}") from error
    rows: dict[str, tuple[TaskRow, int]] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split inside JSON strings
        if not line.strip():
            continue
        try:
            row = _row(line, spec.system)
            if row.id in rows:
                raise TaskError(f"id {row.id!r} is also that of line {rows[row.id][1]}")
            rows[row.id] = (row, number)
            score_of(grader, "", row.fields)
        except (TaskError, GoldError) as error:
            problems += [f"{data}:{number}: {problem}" for problem in str(error).split("\n")]
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise TaskError("\n".join([*(f"task {spec.name!r}: {p}" for p in problems[:_SHOWN_PROBLEMS]), *more]))
    if not rows:
        raise TaskError(f"task {spec.name!r}: {data}: there is no row in this file")
    return tuple(row for row, _ in rows.values())


def _row(line: str, system: str | None) -> TaskRow:
    try:
        fields = loads(line)
        if isinstance(fields, dict):  # as data frames write rows: NaN for what a row does not have
            fields = {name: value for name, value in fields.items() if not is_nan(value)}
        model = RowLine.model_validate(fields)
    except ValidationError as error:
        raise TaskError("\n".join(_problems(error))) from None
    except LongNumber as error:
        raise TaskError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"is not JSON: {error}") from None
    turns = [Message(turn.role, turn.content) for turn in model.messages or ()]  # type: ignore[arg-type]
    messages = turns or [Message("user", model.prompt or "")]
    if system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system))
    return TaskRow(model.id, tuple(messages), fields)


def _problems(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        place = dotted(detail["loc"])
        message = message_of(detail, syntax="JSON")
        yield f"{place}: {message}" if place else message


def _digest(spec: TaskFile, grader: GraderModel, rows: Sequence[TaskRow]) -> str:
    """Digest of everything that questions and scores depend on; the folder of the files is not among it."""
    meaning = {
        "name": spec.name,
        "domain": spec.domain,
        "grader": [spec.grader, grader.model_dump(mode="json")],
        "ask": [spec.max_tokens, spec.stop, spec.system],
        "rows": [row.fields for row in rows],
    }
    return json_digest(meaning)
