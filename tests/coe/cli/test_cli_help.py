"""Every command and option explains itself, in one voice."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from coe.cli.app import app
from coe.evaluation.graders import GRADERS
from coe.version import __version__
from routers.factory import router_class
from routers.kind_list import KINDS, UPDATABLE
from routers.selectors import BEST, SELECTORS
from routers.update import Updatable

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
        *("init", "config", "doctor", "ask", "chat", "route", "registry", "latent", "eval", "outcomes", "profile"),
        *("router", "encoder", "serve", "plan", "simulate", "batch", "replay"),
    }


def help_of(command: str, parameter: str) -> str:
    [found] = [one for one in ALL[command].params if one.name == parameter]
    return str(found.help)


def test_the_kinds_of_routers_are_those_of_the_list() -> None:
    listed = help_of("coe router train", "kind").partition(" (")[0]
    assert listed.split(", ") == list(KINDS)
    assert help_of("coe router update", "router") == f"Saved router: {', '.join(UPDATABLE)}."


def test_the_kinds_that_can_be_updated_are_those_that_keep_their_rows() -> None:
    members = {"rows", "extended", "with_rows"}
    assert members <= set(dir(Updatable))
    assert {kind for kind in KINDS if members <= set(dir(router_class(kind)))} == set(UPDATABLE)


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
    short = {"-c": "--config", "-o": "--out", "-i": "--input", "-m": "--model", "-k": "--top-k"}
    for parameter in LEAVES[name].params:
        for option in parameter.opts:
            assert "_" not in option or not option.startswith("-"), option
            if option in short:
                assert short[option] in parameter.opts, f"{name} {option}"


def named(option: str) -> list[tuple[str, Any]]:
    """(command, parameter) of an option in all commands that have it."""
    return [(name, each) for name, command in LEAVES.items() for each in command.params if option in each.opts]


@pytest.mark.parametrize("name", LEAVES)
def test_metavars_are_upper_case_and_stated(name: str) -> None:
    for parameter in LEAVES[name].params:
        if getattr(parameter, "is_flag", False):
            continue
        metavar = parameter.metavar or ""
        assert re.match(r"\[?[A-Z]+", metavar), f"{name} {parameter.name}: {metavar}"
        assert "A,B,C" not in metavar


def test_an_option_has_one_metavar_in_all_commands() -> None:
    options = {option for command in LEAVES.values() for each in command.params for option in each.opts}
    # Files; of an expert, and of counts; of figures; names, and numbers of synthetic ones; rows, and use of a key.
    several = {"--out", "--output", "-o", "--source", "--require", "--experts", "--limit"}
    for option in options - several:
        if option.startswith("-"):
            assert len({each.metavar for _, each in named(option)}) == 1, option


@pytest.mark.parametrize("name", ALL)
def test_defaults_and_exit_statuses_have_one_phrase(name: str) -> None:
    for text in texts(ALL[name]):
        assert not re.search(r"\bDefaults?:|\(default\)|\bNone:|\b[Dd]istil\b", text), text
        exits = re.findall(r".{0,2}\bexit .{0,11}", text, re.IGNORECASE)
        assert all(found in ("; exit status 1 if", "; exit status 3 if") for found in exits), text


@pytest.mark.parametrize("option", ["--seed", "--registry", "--temperature", "--max-tokens", "--limit", "--allowed"])
def test_an_option_of_one_meaning_has_one_text_and_one_range(option: str) -> None:
    found = [each for each in named(option) if each[0] != "coe keys create"]  # its --limit is one of use, not of rows
    assert len(found) > 1
    assert len({each.help for _, each in found}) == 1
    assert len({(getattr(each, "min", None), getattr(each, "max", None)) for _, each in found}) == 1


def test_what_is_written_is_named_by_out() -> None:
    assert (
        {name for name, _ in named("--output")}
        == {name for name, _ in named("--out")}
        >= {
            *("coe eval", "coe batch", "coe profile", "coe init", "coe router train", "coe router update"),
            *("coe outcomes import", "coe outcomes prior", "coe encoder distill"),
        }
    )
    assert all(each.opts == ["--out", "--output", "-o"] for _, each in named("--out"))


def test_top_k_has_its_short_form_everywhere() -> None:
    assert {name for name, _ in named("--top-k")} == {name for name, _ in named("-k")} >= {"coe route"}


@pytest.mark.parametrize("name", ["ask", "chat", "eval", "serve", "batch", "plan", "route"])
def test_the_configuration_has_a_default(name: str) -> None:
    (config,) = (each for command, each in named("--config") if command == f"coe {name}")
    assert not config.required and config.help.endswith("coe.yaml in the current folder.")


def test_every_grader_and_selector_is_listed() -> None:
    ((_, grader),) = named("--grader")
    assert all(re.search(rf"\b{name}\b", grader.help) for name in GRADERS)
    for _, select in named("--select"):
        assert select.metavar == "NAME[,KEY=VALUE...]"
        assert all(re.search(rf"\b{name}\b", select.help) for name in (BEST, *SELECTORS))


def test_the_panels_are_in_the_order_in_which_a_reader_needs_them() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    panels = [title for title in re.findall(r"─ (\w+) ─", shown) if title != "Options"]
    assert panels == ["Start", "Ask", "Experts", "Measure", "Routers", "Serve"]
    assert "--install-completion" in shown


def test_the_entry_point_runs_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "coe.cli.entry", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, f"coe {__version__}\n")
