"""Mounts the commands and turns errors into one clear line and an exit status.

Exit status: 0 done; 1 a check failed, or the work did; 2 the command line is wrong; 3 done, with fewer answers than
`--require`; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from coe.cli import (
    aliases,
    ask,
    batch,
    encoder,
    evaluate,
    expert_states,
    interrupts,
    keys,
    logs,
    outcomes,
    plan,
    registry,
    replay,
    serve,
    simulate,
    weights,
)
from coe.cli.chat import command as chat
from coe.cli.config import command as config
from coe.cli.doctor import command as doctor
from coe.cli.init import command as init
from coe.cli.latent.app import app as latent_app
from coe.cli.output import console
from coe.cli.profile import command as profile
from coe.cli.route import command as route
from coe.cli.router.app import app as router_app
from coe.version import __version__

START, ASK, EXPERTS, MEASURE, ROUTERS, SERVE = "Start", "Ask", "Experts", "Measure", "Routers", "Serve"

# fmt: off
_ORDER = (
    "init", "config", "doctor", "ask", "chat", "route", "registry", "alias", "promote", "rollback", "latent", "eval",
    "outcomes", "profile", "router", "encoder", "serve", "keys", "ps", "load", "unload", "drain", "undrain", "pin",
    "unpin", "plan", "simulate", "batch", "replay",
)
# fmt: on


class _InOrder(TyperGroup):
    """Lists commands and groups in one order, as a reader meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in `_ORDER`, and what is not in it last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


app = typer.Typer(
    name="coe",
    cls=_InOrder,
    help="Serve and route many expert LLMs and LoRA adapters as one system.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init", rich_help_panel=START)(init.init)
app.add_typer(config.app, name="config", rich_help_panel=START, help="Check the configuration of a service.")
app.command("doctor", rich_help_panel=START)(doctor.doctor)
app.command("ask", rich_help_panel=ASK)(ask.ask)
app.command("chat", rich_help_panel=ASK)(chat.chat)
app.command("route", rich_help_panel=ASK)(route.route)
app.add_typer(registry.app, name="registry", rich_help_panel=EXPERTS, help="Register, list and verify experts.")
app.add_typer(aliases.app, name="alias", rich_help_panel=EXPERTS, help="Names for versions of experts.")
app.command("promote", rich_help_panel=EXPERTS)(aliases.promote)
app.command("rollback", rich_help_panel=EXPERTS)(aliases.rollback)
app.add_typer(
    latent_app, name="latent", rich_help_panel=EXPERTS, help="Probe experts' hidden states; train compositions."
)
app.command("eval", rich_help_panel=MEASURE)(evaluate.evaluate)
app.add_typer(outcomes.app, name="outcomes", rich_help_panel=MEASURE, help="Check and import outcome tables.")
app.command("profile", rich_help_panel=MEASURE)(profile.profile)
app.add_typer(router_app, name="router", rich_help_panel=ROUTERS, help="Train, evaluate and compare routers.")
app.add_typer(encoder.app, name="encoder", rich_help_panel=ROUTERS, help="Distill fast encoders for routers.")
app.command("serve", rich_help_panel=SERVE)(serve.serve)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVE, help="API keys of a service.")
app.command("ps", rich_help_panel=SERVE)(weights.ps)
app.command("load", rich_help_panel=SERVE)(weights.load)
app.command("unload", rich_help_panel=SERVE)(weights.unload)
app.command("drain", rich_help_panel=SERVE)(expert_states.drain)
app.command("undrain", rich_help_panel=SERVE)(expert_states.undrain)
app.command("pin", rich_help_panel=SERVE)(expert_states.pin)
app.command("unpin", rich_help_panel=SERVE)(expert_states.unpin)
app.command("plan", rich_help_panel=SERVE)(plan.plan)
app.command("simulate", rich_help_panel=SERVE)(simulate.simulate)
app.command("batch", rich_help_panel=SERVE)(batch.batch)
app.command("replay", rich_help_panel=SERVE)(replay.replay)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"coe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Serve and route many expert LLMs and LoRA adapters as one system."""


def main() -> None:
    """Entry point of the `coe` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers must not fork threads
    logs.quiet_libraries()
    interrupts.watch_signals()
    try:
        app()
    except SystemExit as end:
        sys.exit(_after_flush(interrupts.status_of(end.code)))
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(interrupts.status_of(interrupts.BY_CTRL_C))
    except Exception as error:
        if not (_ours(error) or _of_a_file(error)) or os.environ.get("COE_TRACEBACK"):
            raise
        _print_error(error)
        sys.exit(_after_flush(1))


def _after_flush(status: str | int | None) -> str | int | None:
    """The exit status after the rest of stdout is written: 1 if that fails, with one line unless its reader is gone."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard_stdout()
        if not status and error.errno != errno.EPIPE:
            _print_error(error)
        return status or 1
    return status


def _discard_stdout() -> None:
    """Send the unwritten rest of stdout to the null device, so that the interpreter's last flush does not fail."""
    with suppress(OSError, ValueError):  # a replaced stdout may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _print_error(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    console.print(f"[bold red]error:[/] {_escape(text)}", highlight=False, soft_wrap=True)


def _of_a_file(error: Exception) -> bool:
    """Whether the system refused a file that the error names, or a write to stdout, which has no name."""
    if not isinstance(error, OSError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _ours(error: Exception) -> bool:
    """Whether the error was raised on purpose, with a message for people."""
    from coe.errors import CoeError
    from registry.errors import RegistryError
    from routers.errors import RouterError

    return isinstance(error, CoeError | RegistryError | RouterError)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
