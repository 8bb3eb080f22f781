"""Every command and option explains itself, in one voice."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from coe.cli.app import app

FORBIDDEN = re.compile(
    r"\b(dial|patience|whom|who is asked|anew|nobody|hitherto|foreign|catalogue|said to be|is told|are told|marks|"
    r"the say|stands|afresh|of its own|thereof|such as it is)\b",
    re.IGNORECASE,
)


def commands(command: Any, path: tuple[str, ...] = ("coe",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command, and everything below it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


ALL = {" ".join(path): command for path, command in commands(typer.main.get_command(app))}
LEAVES = {name: command for name, command in ALL.items() if not getattr(command, "commands", None)}


def texts(command: Any) -> list[str]:
    """All prose of a command's help."""
    return [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]


def test_there_are_the_commands_of_the_architecture() -> None:
    top = {name.split()[1] for name in ALL if len(name.split()) > 1}
    assert top >= {
        *("init", "config", "doctor", "ask", "chat", "route", "registry", "eval", "outcomes", "profile"),
        *("router", "encoder", "serve", "plan", "batch", "replay"),
    }


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_that_is_a_sentence(name: str) -> None:
    help_text = ALL[name].help or ""
    first = help_text.strip().split("\n\n")[0]
    assert len(first) > 10 and first[0].isupper() and first.endswith((".", "?")), first


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_help_that_is_a_sentence(name: str) -> None:
    for parameter in ALL[name].params:
        help_text = getattr(parameter, "help", None) or ""
        assert len(help_text) > 6, f"{name} {parameter.name}"
        assert help_text.endswith((".", "?")), f"{name} {parameter.name}: {help_text}"


@pytest.mark.parametrize("name", ALL)
def test_no_word_that_the_field_does_not_use(name: str) -> None:
    for text in texts(ALL[name]):
        assert not FORBIDDEN.search(text), text


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_takes_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in LEAVES[name].params), name


@pytest.mark.parametrize("name", LEAVES)
def test_options_are_spelled_with_dashes_and_one_short_form_means_one_thing(name: str) -> None:
    short = {"-c": "--config", "-o": "--output", "-i": "--input", "-m": "--model", "-k": "--top-k"}
    for parameter in LEAVES[name].params:
        for option in parameter.opts:
            assert "_" not in option or not option.startswith("-"), option
            if option in short:
                assert short[option] in parameter.opts, f"{name} {option}"


def test_the_panels_are_in_the_order_in_which_a_reader_needs_them() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    panels = [title for title in re.findall(r"─ (\w+) ─", shown) if title != "Options"]
    assert panels == ["Start", "Ask", "Experts", "Measure", "Routers", "Serve"]
    assert "--install-completion" in shown
