from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, model_validator

from registry.documents import Document, dotted, load_document, parse_document, validate
from registry.errors import InvalidSpec

FILE = Path("conf.yaml")


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    weight: float = 1.0

    @model_validator(mode="after")
    def _light(self) -> Item:
        if self.weight > 10:
            raise ValueError("too heavy")
        return self


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    items: list[Item]
    owner: Item | None = None
    kind: str | int = "plain"


def parse(text: str) -> Document:
    return parse_document(text, FILE)


def problems_of(text: str, model: type[BaseModel] = Config) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        validate(parse(text), model)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem) for problem in caught.value.problems]


def test_a_good_file_becomes_the_model(tmp_path: Path) -> None:
    path = tmp_path / "conf.yaml"
    path.write_text("items:\n- name: a\n- {name: é, weight: 2}\n", encoding="utf-8")
    document = load_document(path)
    assert validate(document, Config) == Config(items=[Item(name="a"), Item(name="é", weight=2)])
    assert validate(document, Item, ("items", 1)).weight == 2
    assert document.folder == tmp_path


def test_every_problem_is_reported_with_line_and_path() -> None:
    text = "\n".join(
        [
            "items:",
            "  - name: 2026-01-01",  # 2
            "    wieght: 3",  # 3
            "  - weight: x",  # 4
            "  - name: c",  # 5
            "    weight: 11",  # 6
            "owner: {name: [1, 2]}",  # 7
            "itms: []",  # 8
        ]
    )
    assert problems_of(text) == [
        "conf.yaml:2: items[0].name: input should be a valid string, got datetime.date(2026, 1, 1) (quote it in YAML)",
        "conf.yaml:3: items[0].wieght: is not a known field; did you mean 'weight'?",
        "conf.yaml:4: items[1].name: is required",
        "conf.yaml:4: items[1].weight: input should be a valid number, unable to parse string as a number, got 'x'",
        "conf.yaml:5: items[2]: too heavy",
        "conf.yaml:7: owner.name: input should be a valid string, got [1, 2]",
        "conf.yaml:8: itms: is not a known field; did you mean 'items'?",
    ]


def test_tags_of_unions_are_not_part_of_the_path() -> None:
    assert problems_of("items: []\nkind: []") == [
        "conf.yaml:2: kind: input should be a valid string, got []",
        "conf.yaml:2: kind: input should be a valid integer, got []",
    ]


def test_long_values_are_shortened_and_unknown_fields_never_shown() -> None:
    (problem,) = problems_of("items: " + "x" * 200)
    assert problem.endswith("xxx...") and len(problem) < 160
    (problem,) = problems_of("items: []\napi_key: sk-secret")
    assert "secret" not in problem


@pytest.mark.parametrize("text", ["", "# nothing\n", "null", "items: []\nowner: {name: a}\n---\nmore: 1"])
def test_not_exactly_one_document(text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"conf.yaml:\d: is (empty; expected items|not YAML: expected a single)"):
        validate(parse(text), Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {\n", r"conf.yaml:3: is not YAML: while parsing a flow node"),
        ("a: 1\n\tb: 2\n", r"conf.yaml:2: is not YAML: while scanning for the next token"),
        ("a: *nowhere", r"conf.yaml:1: is not YAML: found undefined alias"),
        ("\na: !!python/object/apply:os.system ['true']", r"conf.yaml:2: is not YAML: could not determine a con"),
        ("? [a, b]\n: 1\n? {c: d}\n: 2", r"conf.yaml:1: is not YAML: while constructing a mapping"),
        ("a: 1\nb: \x00", r"conf.yaml: is not YAML: unacceptable character"),
    ],
)
def test_malformed_yaml_names_its_line(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(text)


def test_repeated_keys_are_all_reported() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse("a: 1\nb:\n- c: 1\n  c: 2\na: 3\nd: &x {e: 1}\nf: *x\n")
    assert [str(problem) for problem in caught.value.problems] == [
        "conf.yaml:4: b[0].c: is given twice; the first is on line 3",
        "conf.yaml:5: a: is given twice; the first is on line 1",
    ]


def test_merge_keys_work_and_may_be_overridden() -> None:
    document = parse("base: &b {name: a, weight: 2}\nitems:\n- <<: *b\n  weight: 3\n- <<: *b\n")
    assert document.value["items"] == [{"name": "a", "weight": 3}, {"name": "a", "weight": 2}]
    assert document.line(("items", 0, "weight")) == 4


def test_a_document_that_contains_itself_is_refused_by_validation() -> None:
    assert problems_of("items: &x [*x]")[0].startswith("conf.yaml:1: items[0]")


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: é".encode("latin-1"))
    for path, message in [
        (tmp_path / "absent.yaml", "there is no such file"),
        (tmp_path, "is a folder, not a file"),
        (latin, "cannot be read: 'utf-8'"),
        (Path("/dev/zero"), "is a pipe, socket or device, not a file"),
    ]:
        with pytest.raises(InvalidSpec, match=f"{path}: {message}"):
            load_document(path)


def test_variables_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert parse("a: ${SECRET}").value == {"a": "${SECRET}"}


def test_places_of_what_is_not_in_the_file() -> None:
    document = parse("a:\n  b: 1\n")
    assert document.place(("a", "b", "c")) == "conf.yaml:2: a.b"
    assert document.place(("a", "z")) == "conf.yaml:1: a.z"
    assert document.place(()) == "conf.yaml:1"
    assert Document(FILE, {}).place(("a",)) == "conf.yaml:1"
    assert dotted(("a", 0, "b", 1, 2)) == "a[0].b[1][2]"


def test_models_without_a_json_schema_still_suggest_fields() -> None:
    class Odd(BaseModel):
        model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

        value: Any = None
        handler: Path | type[Document] = FILE
        thing: Document | None = None

    assert problems_of("valu: 1", Odd) == ["conf.yaml:1: valu: is not a known field; did you mean 'value'?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: " + "[" * 100_000, r"conf.yaml:2: is not YAML: nested more than 100 levels deep"),
        ("\n".join(f"{' ' * level}k:" for level in range(3000)), r"conf.yaml:\d+: is not YAML: nested more than 100"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300)),
            r"conf.yaml:100: .*nested more",
        ),
        ("a: 1\nb: 2020-99-99", r"conf.yaml:2: is not YAML: '2020-99-99' is not a valid timestamp \(quote it"),
        ('\na: !!int "abc"', r"conf.yaml:2: is not YAML: 'abc' is not a valid int"),
        ('a: !!int ""', r"conf.yaml:1: is not YAML: '' is not a valid int"),
        ('a: !!bool "abc"', r"conf.yaml:1: is not YAML: 'abc' is not a valid bool"),
        ('a: !!timestamp "abc"', r"conf.yaml:1: is not YAML: 'abc' is not a valid timestamp"),
        ("a: 1\nb: " + "9" * 10_000, r"conf.yaml:2: is not YAML: '9+\.\.\. is not a valid int"),
        ("a: 0x" + "f" * 10_000, r"conf.yaml:1: is not YAML: an integer of 40000 bits"),
        ("a: 1" + ":10" * 100_000, r"conf.yaml:1: is not YAML: a number to the base 60 of more than 100 characters"),
        ("a: &a {*a : 1}", r"conf.yaml:1: is not YAML: while constructing a mapping: found unhashable key"),
        (f"? {'x' * 100_000}\n: 1\n" * 2, r"conf.yaml:3: x{77}\.\.\.: is given twice"),
    ],
)
def test_hostile_yaml_is_an_error_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message) as caught:
        parse(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}", "{{k: [{}]}}"])
def test_alias_bombs_are_refused_before_they_expand(item: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} " + item.format(", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 12)]
    with pytest.raises(InvalidSpec, match=r"conf.yaml:\d: .*more than 200,000 values once aliases are expanded"):
        parse("\n".join(lines))


@pytest.mark.parametrize("text", ["a: &a {<<: *a}", "a: &a {<<: [*a, *a]}", "a: &a {<<: &b {<<: *a}}", "a: &a [*a]"])
def test_aliases_of_themselves_end(text: str) -> None:
    assert list(parse(text).value) == ["a"]


def test_values_are_counted_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.yaml_loader._MOST_NODES", 1000)
    assert len(parse(f"[{'1,' * 999}]").value) == 999
    with pytest.raises(InvalidSpec, match="more than 1,000 values: split the file"):
        parse(f"[{'1,' * 1000}" + "never closed")


def test_only_the_first_problems_of_a_document_are_reported() -> None:
    class Empty(BaseModel, extra="forbid"):
        pass

    found = problems_of("\n".join(f"k{number}: 1" for number in range(2000)), Empty)
    assert len(found) == 51
    assert "has 1,950 more problems" in found[-1]
    with pytest.raises(InvalidSpec) as caught:
        parse("a: 1\n" * 2000)
    assert len(caught.value.problems) == 50


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_regular_file_is_refused_without_opening_it(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "conf.yaml")
    with pytest.raises(InvalidSpec, match=r"conf.yaml: is a (folder|pipe, socket or device), not a file"):
        load_document(tmp_path / "conf.yaml")


def test_devices_and_sockets_are_refused_without_opening_them(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path in (tmp_path / "s", Path("/dev/zero")):
            with pytest.raises(InvalidSpec, match="is a pipe, socket or device, not a file"):
                load_document(path)


def test_a_file_of_more_characters_than_the_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "at.yaml").write_text("#" * 2**22)
    assert load_document(tmp_path / "at.yaml").value is None
    (tmp_path / "above.yaml").write_text("#" * (2**22 + 1))
    with pytest.raises(InvalidSpec, match="has more than 4,194,304 characters"):
        load_document(tmp_path / "above.yaml")


def test_a_value_in_an_error_is_bounded_and_without_passwords() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nowner: {name: *c}\n"
    assert max(map(len, problems_of(bomb))) < 200
    (problem,) = problems_of("items: http://bob:hunter2@host/v1")
    assert "hunter2" not in problem and "http://***@host/v1" in problem


def test_an_empty_document_is_valid_where_every_field_has_a_default() -> None:
    class Defaults(BaseModel):
        size: int = 3

    assert validate(parse("# nothing\n"), Defaults).size == 3


class Values(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = ""
    number: float = 0.0
    whole: int = 0
    flag: bool = False
    by_name: dict[str, float] = {}


@pytest.mark.parametrize("written", ["1:30", "1:00:00", "190:20:30.15", "-1:30", "010", "007", "-017", "0_17", "0o17"])
def test_numbers_to_the_base_60_and_8_are_text(written: str) -> None:
    document = parse(f"text: {written}\nlist: [{written}]\n{written}: x\n")
    assert document.value == {"text": written, "list": [written], written: "x"}
    assert validate(parse(f"text: {written}"), Values).text == written


@pytest.mark.parametrize("written", ["1:30", "1:00:00", "190:20:30.15", "0o17"])
@pytest.mark.parametrize("name", ["number", "whole"])
def test_they_are_no_numbers(written: str, name: str) -> None:
    (problem,) = problems_of(f"\n{name}: {written}", Values)
    assert problem.startswith(f"conf.yaml:2: {name}: input should be a valid ") and problem.endswith(f"'{written}'")


@pytest.mark.parametrize(
    ("written", "value"), [("010", 10), ("-017", -17), ("0", 0), ("00", 0), ("08", 8), ("0x1F", 31), ("1_000", 1000)]
)
def test_a_number_with_leading_zeros_is_decimal(written: str, value: int) -> None:
    assert validate(parse(f"whole: {written}\nnumber: {written}"), Values) == Values(whole=value, number=value)


@pytest.mark.parametrize(
    ("written", "value"), [("no", "False"), ("Yes", "True"), ("on", "True"), ("OFF", "False"), ("1_000", "1000")]
)
def test_a_name_that_is_read_as_something_else_is_shown_as_written(written: str, value: str) -> None:
    assert problems_of(f"text: {written}", Values) == [
        f"conf.yaml:1: text: input should be a valid string, got {value} (read from '{written}': quote it in YAML)"
    ]
    assert validate(parse(f"text: '{written}'"), Values).text == written


@pytest.mark.parametrize("written", ["no", "Yes", "on", "010", "1_000", "1.50", "0x10", "2026-01-01", "1:30", "~"])
def test_keys_are_text_as_written(written: str) -> None:
    document = parse(f"by_name:\n  {written}: 1\n  other: x\n")
    assert list(document.value["by_name"]) == [written, "other"]
    assert document.line(("by_name", written)) == 2
    assert problems_of(f"by_name:\n  other: 1\n  {written}: x", Values)[0].startswith(
        f"conf.yaml:3: by_name.{written}: "
    )


def test_an_anchor_on_a_key_keeps_its_value_elsewhere() -> None:
    assert parse("a: &a 5\nb: {*a : 1}\nc: *a\nd: {<<: {no: 2}}").value == {
        "a": 5,
        "b": {"5": 1},
        "c": 5,
        "d": {"no": 2},
    }


@pytest.mark.parametrize(("character", "name"), [("\x00", "U+0000"), ("\x1b", "U+001B"), ("\ufffe", "U+FFFE")])
def test_a_control_character_is_one_line_with_its_place(character: str, name: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse(f"a: 1\nb: x\nc: {character}\n")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"conf.yaml: is not YAML: unacceptable character {name} on line 3")
    assert line.isprintable()
