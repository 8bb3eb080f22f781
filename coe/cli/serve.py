"""`coe serve`: the OpenAI-compatible endpoint, on Ray Serve."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.flags import SERVICE_CONFIG, ServiceConfig
from coe.cli.interrupts import finalizers_are_silent
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.progress import status

if TYPE_CHECKING:
    from coe.config import ServeConfig
    from coe.serve.cluster.source import Source


def serve(
    config: ServiceConfig = SERVICE_CONFIG,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", metavar="ADDRESS", help="Address to listen on; by default the configuration's, else 127.0.0.1."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="N", min=1, max=65535, help="Port; by default the configuration's, else 8000."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Address of a Ray cluster ('auto'); by default a new Ray on this machine."
        ),
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Serve the experts and policies of a configuration as an OpenAI-compatible endpoint; Ctrl-C stops it.

    While it runs, changes of the registry, of policies and of their routers are checked and then loaded without a
    restart. --json describes the service once it is ready.
    """
    try:
        import threading

        from coe.cli.placed_pools import with_placed_pools
        from coe.serve.cluster.server import Server
        from coe.serve.cluster.source import Source

        with status("reading the configuration, the registry and the routers"):
            place = with_placed_pools(lambda line: _say("placement", line))
            source = Source(config, place, host=host, port=port, ray=ray)
        with source, ExitStack() as running:
            _warn_if_open(source.config.serve)
            _warn_without_key(source.config.serve)
            with status("starting"):
                server = running.enter_context(Server(source, _say))
            _welcome(source)
            emit_json(_document(source), json)
            server.watch(threading.Event())
    except KeyboardInterrupt:
        finalizers_are_silent()
        console.print("stopped")


def _document(source: Source) -> dict[str, Any]:
    settings, catalog = source.config.serve, source.catalog
    return {
        "url": settings.url,
        "policies": list(catalog.policies),
        "experts": list(catalog.snapshot),
        "decisions": settings.log.folder,
    }


def _warn_if_open(settings: ServeConfig) -> None:
    """Warn when machines other than this one can send requests: there are no keys."""
    from coe.serve.http.guard import is_loopback

    if not is_loopback(settings.host):
        _say(
            "warning",
            f"{settings.host} is not a loopback address, and the service has no keys: whoever reaches port "
            f"{settings.port} can use every expert. Listen on 127.0.0.1, or let only a proxy that authenticates reach "
            "this port (docs/serving.md)",
        )


def _warn_without_key(settings: ServeConfig) -> None:
    """Warn when admin calls need a key that there is not."""
    import os

    if settings.admin_key_env is not None and not os.environ.get(settings.admin_key_env, "").strip():
        _say("warning", f"{settings.admin_key_env} (serve.admin_key_env) is not set: no admin call will be accepted")


def _say(part: str, what: str) -> None:
    console.print(f"[bold]{part:>14}[/]  {escape(what)}", highlight=False, soft_wrap=True)


def _welcome(source: Source) -> None:
    settings, catalog = source.config.serve, source.catalog
    policies = [f"coe/{name}" for name in catalog.policies]
    models = ", ".join((["auto"] if policies else []) + policies)
    _say("ready", f"{settings.url} for any OpenAI client")
    _say("models", f"{models}{' or ' if models else ''}one of {len(catalog.snapshot)} experts by name")
    _say("decisions", str(settings.log.folder or "are not logged"))
    _say("Ctrl-C", "stops")
