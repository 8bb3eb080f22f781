"""`coe serve`: the OpenAI-compatible endpoint, on Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from coe.cli.output import console

if TYPE_CHECKING:
    from coe.serve.cluster.source import Source


def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="The service's YAML.")],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; else the configuration's (127.0.0.1).")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Else the configuration's (8000).")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster ('auto'); else a Ray of its own on this machine.")
    ] = None,
) -> None:
    """Serve every expert and policy of a configuration; Ctrl-C stops.

    The registry, the configuration's policies, and their routers may change while it runs: they are checked, then
    pushed to all processes.
    """
    import signal
    import threading

    from coe.serve.cluster.server import Server
    from coe.serve.cluster.source import Source

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with console.status("reading the configuration, the registry and the routers"):
            source = Source(config, host=host, port=port, ray=ray)
        with source, console.status("starting") as status, Server(source, _say) as server:
            status.stop()
            _welcome(source)
            server.watch(threading.Event())
    except KeyboardInterrupt:
        console.print("stopped")


def _say(part: str, what: str) -> None:
    console.print(f"[bold]{part:>14}[/]  {escape(what)}", highlight=False, soft_wrap=True)


def _welcome(source: Source) -> None:
    settings, catalog = source.config.serve, source.catalog
    policies = [f"coe/{name}" for name in catalog.policies]
    models = ", ".join((["auto"] if policies else []) + policies)
    _say("ready", f"http://{settings.host}:{settings.port}/v1 for any OpenAI client")
    _say("models", f"{models}{' or ' if models else ''}one of {len(catalog.snapshot)} experts by name")
    _say("decisions", str(settings.log.folder or "are not logged"))
    _say("Ctrl-C", "stops")
