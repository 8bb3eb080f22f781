"""`coe chat`: its flags, and how it begins and ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.flags import CONFIG_HELP, ApiKeyEnv, MaxTokens, Temperature, default_config
from coe.cli.interrupts import interrupted
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.progress import status

if TYPE_CHECKING:
    from coe.cli.chat.backends import Backend
    from coe.cli.chat.conversation import Conversation, Lines


def chat(
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help=CONFIG_HELP)] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="URL of a running service in place of --config.")
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="NAME", help="'auto', 'coe/POLICY', or an expert; /model changes it."),
    ] = "auto",
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    api_key_env: ApiKeyEnv = None,
    json: JsonTarget = None,
) -> None:
    """Talk to the experts: answers stream, and the conversation is kept.

    /why explains who answered, /model changes it, /help lists all commands. Lines may also be piped in: answers go to
    stdout, everything else to stderr. --json writes the conversation at the end.
    """
    from coe.cli.chat.conversation import Lines

    if config is not None and url is not None:
        raise typer.BadParameter("give either --config FILE or --url URL of a running service", param_hint="--config")
    if url is None and config is None:
        config = default_config(otherwise="name a configuration with --config, or a running service with --url")
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    with asyncio.Runner() as runner, _opened(runner, config, url, _key(api_key_env)) as backend:
        talk = _begin(backend, runner, model, settings, system, quiet=json == "-")
        _talk(talk, Lines(lambda: runner.run(backend.models())))
    emit_json(_document(talk), json)
    if talk.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not (key := os.environ.get(name, "").strip()):
        raise typer.BadParameter(f"the environment variable {name} is not set", param_hint="--api-key-env")
    return key


@contextmanager
def _opened(runner: asyncio.Runner, config: Path | None, url: str | None, key: str | None) -> Iterator[Backend]:
    from coe.cli.chat.backends import open_backend

    stack = AsyncExitStack()
    with status("opening"):
        backend = runner.run(stack.enter_async_context(open_backend(config, url, key)))
    try:
        yield backend
    finally:
        runner.run(stack.aclose())


def _begin(
    backend: Backend, runner: asyncio.Runner, model: str, settings: dict[str, Any], system: str | None, *, quiet: bool
) -> Conversation:
    from coe.cli.chat.conversation import Conversation

    talk = Conversation(backend, runner, model, settings, system, quiet)
    talk.check_model(model)
    if sys.stdin.isatty():
        console.print(f"{model} answers. /help lists the commands, Ctrl-D leaves.", highlight=False, markup=False)
    return talk


def _talk(talk: Conversation, lines: Lines) -> None:
    """Until the end of the lines, /quit, or two Ctrl-C in a row. A first one stops the answer that it meets."""
    stopped = False
    while True:
        try:
            line = lines.read()
            if line is None:
                return
            stopped = False
            if not talk.take(line):
                return
        except KeyboardInterrupt:
            if stopped or not lines.is_terminal:
                raise interrupted() from None
            stopped = True
            console.print("\n[yellow]stopped[/]: Ctrl-C again leaves", highlight=False)


def _document(talk: Conversation) -> dict[str, Any]:
    answers = [{"expert": one.expert, "text": one.text, "why": one.why} for one in talk.answers]
    return {"model": talk.model, "messages": talk.messages, "answers": answers}
