"""`coe serve`: the OpenAI-compatible endpoint, on Ray Serve."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.flags import SERVICE_CONFIG, ServiceConfig
from coe.cli.interrupts import finalizers_are_silent
from coe.cli.logs import json_lines
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.progress import status
from coe.telemetry.json_logs import writes_json

if TYPE_CHECKING:
    from coe.config import Config, ServeConfig
    from coe.serve.cluster.source import Source

logger = logging.getLogger("coe.serve")


class LogFormat(StrEnum):
    """Values of `--log-format`."""

    TEXT = "text"
    JSON = "json"


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
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on an address that others reach, though there is no API key.")
    ] = False,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(
            "--log-format",
            metavar="FORMAT",
            help="Lines of all logs, and of this terminal: text or json; by default the configuration's, else text.",
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

        from coe.cli.log_placer import LogPlacer
        from coe.serve.cluster.server import Server
        from coe.serve.cluster.source import Source

        with status("reading the configuration, the registry and the routers"):
            placer = LogPlacer(lambda line: _say("placement", line))
            chosen = None if log_format is None else log_format.value
            source = Source(config, placer, host=host, port=port, ray=ray, insecure=insecure or None, log_format=chosen)
            _check_traces(source.config.serve)
            valid = _valid_keys(source.config)
            _check_usage(source.config.serve)
        with source, ExitStack() as running:
            if source.config.serve.log_format == "json":
                json_lines()
            _warn_if_open(source.config.serve, valid)
            _warn_without_key(source.config.serve)
            with nullcontext() if writes_json() else status("starting"):  # whose lines are plain
                server = running.enter_context(Server(source, _say))
            _welcome(source, valid)
            emit_json(_document(source), json)
            server.watch(threading.Event())
    except KeyboardInterrupt:
        finalizers_are_silent()
        _say("stopped", "by a signal") if writes_json() else console.print("stopped")


def _document(source: Source) -> dict[str, Any]:
    settings, catalog = source.config.serve, source.catalog
    return {
        "url": settings.url,
        "policies": list(catalog.policies),
        "experts": list(catalog.snapshot),
        "decisions": settings.log.folder,
    }


def _valid_keys(config: Config) -> int | None:
    """The number of valid API keys; None if requests need none.

    Raises:
        ConfigError: others could send requests to this machine, and need no key.
    """
    from coe.errors import ConfigError
    from coe.serve.http.guard import is_loopback
    from coe.serve.http.keyring import StoredKeys

    settings = config.serve
    keys = StoredKeys(config.registry).changed()
    if keys or settings.keys == "required":
        return sum(key.state(time.time()) == "active" for key in keys or ())
    if not (settings.insecure or is_loopback(settings.host)):
        raise ConfigError(
            f"serve.host: {settings.host} is not a loopback address, and there is no API key: whoever reaches port "
            f"{settings.port} could use every expert. Create a key (`coe keys create NAME`), listen on 127.0.0.1, or "
            "start with --insecure where only a proxy that authenticates reaches this port (docs/serving.md)"
        )
    return None


def _warn_if_open(settings: ServeConfig, valid: int | None) -> None:
    """Warn when machines other than this one can send requests without a key, or nobody can."""
    from coe.serve.http.guard import is_loopback

    if valid is None and not is_loopback(settings.host):
        _say("warning", f"whoever reaches port {settings.port} can use every expert: there is no API key (--insecure)")
    if valid == 0:
        _say("warning", "no API key is valid now: requests are refused until there is one (`coe keys create NAME`)")


def _check_usage(settings: ServeConfig) -> None:
    """Raises StoreError if the usage of keys cannot be kept where the configuration says."""
    from registry.usage_redis import RedisUsage, usage_url

    if settings.usage_url_env is not None:
        with RedisUsage(usage_url(settings.usage_url_env)) as accounts:
            accounts.check()


def _warn_without_key(settings: ServeConfig) -> None:
    """Warn when admin calls need a key that there is not."""
    import os

    if settings.admin_key_env is not None and not os.environ.get(settings.admin_key_env, "").strip():
        _say("warning", f"{settings.admin_key_env} (serve.admin_key_env) is not set: no admin call will be accepted")


def _check_traces(settings: ServeConfig) -> None:
    """Raises ConfigError if traces are asked for, and cannot be exported: before any process starts."""
    from coe.telemetry.export import is_wanted

    is_wanted(settings.trace_endpoint)


def _say(part: str, what: str) -> None:
    if writes_json():
        logger.info("%s: %s", part, what, extra={"fields": {"part": part}})
        return
    console.print(f"[bold]{part:>14}[/]  {escape(what)}", highlight=False, soft_wrap=True)


def _welcome(source: Source, valid: int | None) -> None:
    from coe.telemetry.export import is_wanted

    settings, catalog = source.config.serve, source.catalog
    policies = [f"coe/{name}" for name in catalog.policies]
    models = ", ".join((["auto"] if policies else []) + policies)
    _say("ready", f"{settings.url} for any OpenAI client")
    _say("models", f"{models}{' or ' if models else ''}one of {len(catalog.snapshot)} experts by name")
    if valid is not None:
        _say("keys", f"{valid} valid; a request needs one")
    if is_wanted(settings.trace_endpoint):
        _say("traces", settings.trace_endpoint or "to the collector that the environment names")
    _say("decisions", str(settings.log.folder or "are not logged"))
    _say("Ctrl-C", "stops")
