"""A conversation: lines in, answers out, and the commands that begin with a slash."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from coe.cli.chat.answering import Answering
from coe.cli.chat.backends import Backend
from coe.cli.chat.why import print_why
from coe.cli.output import console, show_answer
from coe.cli.progress import status
from coe.errors import CoeError, ConfigError
from coe.policy import AUTO
from registry.errors import RegistryError, UnknownExpert
from routers.base import Message
from routers.errors import RouterError

HELP = """\
/why            why this expert answered
/model [NAME]   who answers: auto, coe/POLICY or an expert; without NAME, list them
/reset          forget the conversation
/help           this list
/quit           leave; so does Ctrl-D
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, twice leaves."""
_MOST_LISTED = 8
COMMANDS = ("/why", "/model", "/reset", "/help", "/quit")


@dataclass(slots=True)
class Conversation:
    """What was said, and who answers next.

    Attributes:
        settings: fields of `GenerateRequest` for every answer.
        system: a first message, kept by /reset.
        failed: whether an answer ended with an error.
    """

    backend: Backend
    runner: asyncio.Runner
    model: str
    settings: Mapping[str, Any]
    system: str | None = None
    quiet: bool = False
    messages: list[Message] = field(default_factory=list)
    answers: list[Answering] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [Message("system", self.system)]
        self.answers = []

    def take(self, line: str) -> bool:
        """A line of the user's; False when it ends the conversation. Raises KeyboardInterrupt from a stopped answer."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/"):
            return self._command(*text.partition(" ")[::2])
        self._answer(line)
        return True

    def check_model(self, name: str) -> None:
        """Raises UnknownExpert where the backend has no such model, ConfigError where it has no `auto`."""
        known = self._models()
        if name == AUTO and name not in known:
            listed = ", ".join(known[:_MOST_LISTED]) + (", ..." if len(known) > _MOST_LISTED else "")
            raise ConfigError(
                f"{AUTO!r} is not among the models of the endpoint, which routes nothing: name one with "
                f"--model NAME; it has {listed or 'none'}"
            )
        if name not in known:
            raise UnknownExpert(name, known, where="the models of this service")

    def _command(self, name: str, argument: str) -> bool:
        match name:
            case "/quit" | "/exit":
                return False
            case "/why" if self.answers:
                print_why(self.answers[-1])
            case "/why":
                self._say("there is no answer yet")
            case "/model":
                self._choose(argument.strip())
            case "/reset":
                self.reset()
                self._say("forgotten")
            case "/help":
                self._say(HELP)
            case _:
                self._say(f"there is no command {name}; /help lists them")
        return True

    def _models(self) -> Sequence[str]:
        with status("listing the models"):
            return self.runner.run(self.backend.models())

    def _choose(self, name: str) -> None:
        try:
            if name:
                self.check_model(name)
                self.model = name
                self._say(f"{name} answers from now on")
            else:
                names = self._models()
                self._say("\n".join(f"{'*' if one == self.model else ' '} {one}" for one in names))
        except (CoeError, RegistryError) as error:
            self._fail(error)

    def _answer(self, text: str) -> None:
        """Ask and stream; what a stopped answer had said is kept, a question without any answer is not."""
        self.messages.append(Message("user", text))
        answering = Answering()
        try:
            self.runner.run(self._stream(answering))
        except (CoeError, RegistryError, RouterError) as error:
            self._fail(error)
        finally:
            if answering.text:
                self.messages.append(Message("assistant", answering.text))
                self.answers.append(answering)
            else:
                self.messages.pop()

    async def _stream(self, answering: Answering) -> None:
        pieces = self.backend.answer(self.messages, self.model, self.settings, answering)
        began = False
        try:
            async with aclosing(pieces):
                with status("waiting for the first words"):
                    first = await anext(pieces, None)
                    while first == "" and answering.expert is None:
                        first = await anext(pieces, None)
                began = True
                self._say(f"{answering.expert}:", style="bold cyan")
                self._show(first or "")
                async for piece in pieces:
                    self._show(piece)
        finally:
            if began:
                self._show("\n")

    def _show(self, text: str) -> None:
        if not self.quiet:
            show_answer(text)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self._say(f"error: {error}", style="red")

    @staticmethod
    def _say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Lines:
    """The user's lines: with a prompt, editing and completion on a terminal, else as they come.

    Args:
        models: the names that /model completes.
    """

    def __init__(self, models: Callable[[], Sequence[str]]) -> None:
        self.is_terminal = sys.stdin.isatty()
        if self.is_terminal:
            _edit_lines(models)

    def read(self) -> str | None:
        """The next line; `None` after the last. Raises KeyboardInterrupt from the prompt."""
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input('… ')}"
        except EOFError:
            print()
            return None
        return line


def _edit_lines(models: Callable[[], Sequence[str]]) -> None:
    """Let `input` edit, remember and complete lines, where the platform has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        known = models() if readline.get_line_buffer().startswith("/model ") else COMMANDS
        return next(iter([name for name in known if name.startswith(text)][state:]), None)

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
