"""`coe doctor`: its flags, and what it prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.progress import status
from coe.cli.registry_url import RegistryUrl

if TYPE_CHECKING:
    from coe.cli.doctor.finding import Check, Finding

_STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Also check this configuration (YAML) and its experts."),
    ] = None,
    registry: RegistryUrl = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1.0, help="Seconds for each check.")
    ] = 120.0,
    json: JsonTarget = None,
) -> None:
    """Check this machine and say what is wrong and what to do; exit status 1 if anything is broken.

    Looks at Python, packages, memory, device, threads, disk, the port of the service, the files of registered experts
    and what Ray left behind. Nothing is changed.
    """
    from coe.cli.doctor.finding import Level, run_checks

    with status("checking"):
        found = run_checks(_checks(config, registry), timeout_s=timeout)
    if json != "-":
        _print(found)
    broken = [one for one in found if one.level is Level.BROKEN]
    emit_json({"broken": len(broken), "findings": found}, json)
    if broken:
        raise typer.Exit(1)


def _checks(config: Path | None, url: str | None) -> dict[str, Check]:
    from coe.cli.doctor import machine, service

    host, number = _address(config)
    checks: dict[str, Check] = {
        "python": machine.python,
        "packages": machine.packages,
        "memory": machine.memory,
        "device": machine.device,
        "threads": machine.threads,
        "disk": machine.disk,
        "port": partial(service.port, host, number),
    }
    if config is not None:
        checks["config"] = partial(service.configuration, config)
        checks["budget"] = partial(service.budget, config)
    else:
        checks["registry"] = partial(service.registry, url)
    checks["ray"] = service.ray
    return checks


def _address(config: Path | None) -> tuple[str, int]:
    """Where the service would listen; the default where the configuration cannot be read."""
    from coe.config import ServeConfig, load_config
    from coe.errors import ConfigError

    try:
        serve = ServeConfig() if config is None else load_config(config).serve
    except ConfigError:  # the check of the configuration reports it
        serve = ServeConfig()
    return serve.host, serve.port


def _print(found: list[Finding]) -> None:
    from rich.markup import escape

    out = stdout_console()
    for one in found:
        style = _STYLES[one.level]
        line = f"[{style}]{one.level:>7}[/] [bold]{one.area}[/]: {escape(one.text)}"
        out.print(line, highlight=False, soft_wrap=True)
        if one.fix:
            out.print(f"        to do: {escape(one.fix)}", highlight=False, soft_wrap=True)
