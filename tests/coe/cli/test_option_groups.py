"""Option groups: dataclasses become flags, and come back as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from coe.cli.option_groups import with_option_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", min=1)]
    height: Annotated[int, typer.Option("--height")] = 2

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Colour:
    names: Annotated[list[str] | None, typer.Option("--colour")] = None


app = typer.Typer()


@app.command()
@with_option_groups
def draw(
    title: Annotated[str, typer.Argument()], size: Size, colour: Colour, plain: Annotated[bool, typer.Option()] = False
) -> None:
    """Draw a box."""
    print(title, size.area, colour, plain)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_flags_of_groups_come_back_as_values() -> None:
    assert run("box", "--width", "3") == (0, "box 6 Colour(names=None) False\n")
    code, output = run("box", "--width", "3", "--height", "5", "--colour", "a", "--colour", "b", "--plain")
    assert (code, output) == (0, "box 15 Colour(names=['a', 'b']) True\n")


def test_a_field_without_a_default_is_required_and_limits_hold() -> None:
    assert run("box")[0] == 2 and "--width" in run("box")[1]
    assert run("box", "--width", "0")[0] == 2


def test_help_shows_the_command_and_every_flag() -> None:
    code, output = run("--help")
    assert code == 0 and "Draw a box." in output
    assert all(flag in output.lower() for flag in ("--width", "--height", "--colour", "--plain", "title"))
