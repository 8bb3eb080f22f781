"""Mounts the commands and turns errors into one clear line and an exit status.

Exit status: 0 done; 1 a check said no, or the work failed; 2 the command line is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from coe.cli import ask, batch, config, encoder, evaluate, init, outcomes, plan, profile, registry, replay, route, serve
from coe.cli.output import console
from coe.cli.router.app import app as router_app
from coe.version import __version__

app = typer.Typer(
    name="coe",
    help="Serve and route many expert LLMs and LoRA adapters as one system.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(registry.app, name="registry", help="What experts exist: apply, list, verify.")
app.add_typer(outcomes.app, name="outcomes", help="Check and import measured outcomes.")
app.add_typer(router_app, name="router", help="Train, cross-validate and evaluate routers.")
app.add_typer(encoder.app, name="encoder", help="Make a fast encoder out of a good one.")
app.add_typer(config.app, name="config", help="Check a configuration.")
app.command("init")(init.init)
app.command("route")(route.route)
app.command("ask")(ask.ask)
app.command("serve")(serve.serve)
app.command("batch")(batch.batch)
app.command("plan")(plan.plan)
app.command("replay")(replay.replay)
app.command("eval")(evaluate.evaluate)
app.command("profile")(profile.profile)


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
    # Nothing is fetched from a hub behind the user's back, and tokenizers do not fork threads under us.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/]")
        sys.exit(130)
    except Exception as error:
        if not _ours(error) or os.environ.get("COE_TRACEBACK"):
            raise
        console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _ours(error: Exception) -> bool:
    """Whether the error was raised on purpose, with a message for people."""
    from coe.errors import CoeError
    from registry.errors import RegistryError
    from routers.errors import RouterError

    return isinstance(error, CoeError | RegistryError | RouterError)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
