"""`coe ps | load | unload`: the weights in the memory of a running service, by its admin calls."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final

import typer

from coe.cli.flags import ApiKeyEnv
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import status
from coe.errors import ConfigError, RemoteError

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_CONNECT_S: Final = 2.0
"""Seconds to connect to the service."""
_SHORT_S: Final = 10.0
"""Seconds for an answer that waits for nothing; a gateway gives its hosts 3."""
LONG_S: Final = 3600.0
"""Seconds for a load; the deadline of the service is shorter."""
_MOST_BYTES: Final = 64 * 2**20

_ELSEWHERE: Final = "is the service running there? --url names another address"

Url = Annotated[str, typer.Option("--url", metavar="URL", help="URL of the running service.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Experts.")]


def ps(url: Url = DEFAULT_URL, api_key_env: ApiKeyEnv = None, json: JsonTarget = None) -> None:
    """List the weights in the memory of a running service, host by host."""
    hosts = call_admin(url, "GET", "residency", {}, api_key_env, _SHORT_S)["hosts"]
    if json != "-":
        _print_hosts(hosts)
    emit_json({"hosts": hosts}, json)


def load(names: Names, url: Url = DEFAULT_URL, api_key_env: ApiKeyEnv = None, json: JsonTarget = None) -> None:
    """Load experts on a running service, all of them together, on every host that serves them.

    They stay until their memory is needed, or until they are idle for their `ttl_s`; `pins` of the configuration keep
    experts for good. An adapter loads its base, a composed expert its members.
    """
    with status(f"loading {', '.join(names)}"):
        said = call_admin(url, "POST", "load", {"expert": names}, api_key_env, LONG_S)
    for host in said["hosts"]:
        console.print(f"{host['pool']}: loaded {', '.join(host['loaded'])}", highlight=False, markup=False)
    emit_json(said, json)


def unload(
    names: Names,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds to wait for requests that use them.")
    ] = 30.0,
    url: Url = DEFAULT_URL,
    api_key_env: ApiKeyEnv = None,
    json: JsonTarget = None,
) -> None:
    """Free the memory of experts on a running service; the next request loads them again.

    An adapter unloads its base, a composed expert its members. Pinned experts are refused, as are those that requests
    still use when the time is over.
    """
    with status(f"unloading {', '.join(names)}"):
        query = {"expert": names, "wait_s": [f"{wait:g}"]}
        said = call_admin(url, "POST", "unload", query, api_key_env, wait + LONG_S)
    for host in said["hosts"]:
        what = f"unloaded {', '.join(host['unloaded'])}" if host["unloaded"] else "nothing of it was in memory"
        console.print(f"{host['pool']}: {what}", highlight=False, markup=False)
    emit_json(said, json)


def call_admin(
    url: str,
    method: str,
    action: str,
    query: dict[str, list[str]],
    api_key_env: str | None,
    timeout_s: float,
    *,
    field: str = "hosts",
    kind: type = list,
) -> Any:
    """The answer of an admin call, which has `field`, of that kind. Raises RemoteError with the service's own words."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL like {DEFAULT_URL}")
    _check_connects(base)

    import asyncio
    import json
    from urllib.parse import urlencode

    from coe.engines.remote.client import fetch
    from coe.engines.remote.events import MalformedStream

    place = f"{base}/admin/{action}" + (f"?{urlencode(query, doseq=True)}" if query else "")
    asked = fetch(place, timeout_s=timeout_s, most_bytes=_MOST_BYTES, method=method, headers=_headers(api_key_env))
    try:
        code, body = asyncio.run(asked)
    except TimeoutError as error:
        raise RemoteError(f"{base} did not answer within {timeout_s:g} s: {_ELSEWHERE}") from error
    except ConnectionError as error:
        raise RemoteError(f"{base} broke off the answer ({error}): {_ELSEWHERE}") from error
    except (MalformedStream, ValueError) as error:
        raise RemoteError(f"the answer of {base} cannot be used: {error}") from error
    try:
        document = json.loads(body)
        if code == 200 and isinstance(document[field], kind):
            return document
        raise RemoteError(str(document["error"]["message"]))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RemoteError(f"{base} answers with HTTP {code}: is it a service of `coe serve`?") from error


def _check_connects(base: str) -> None:
    """Connect once: the HTTP client takes seconds to import, and a wrong address should fail at once.

    Raises:
        ConfigError: it is not a URL.
        RemoteError: nothing accepts the connection.
    """
    import socket
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(base)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        if not host:
            raise ValueError("it names no host")
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        why = f"no connection within {_CONNECT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise RemoteError(f"{base} cannot be reached ({why}): {_ELSEWHERE}") from error
    except ValueError as error:
        raise ConfigError(f"{base!r} is not a URL like {DEFAULT_URL}: {error}") from error


def _headers(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if not (key := os.environ.get(api_key_env, "").strip()):
        raise typer.BadParameter(f"the environment variable {api_key_env} is not set", param_hint="--api-key-env")
    return {"Authorization": f"Bearer {key}"}


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table, notes = Table("host", "weights", "state", "MiB", "used by", "idle s", "left s", "priority"), []
    for number, host in enumerate(hosts, start=1):
        place = f"{host.get('pool')} {number}"
        for each in host.get("weights", []):
            left = (
                "pinned" if each["pinned"] else "never" if each["unload_in_s"] is None else f"{each['unload_in_s']:.0f}"
            )
            version = "" if each["version"] is None else f"@{each['version']}"
            size, idle = f"{each['size_bytes'] / 2**20:,.0f}", f"{each['idle_s']:.0f}"
            cells = (place, f"{each['name']}{version}", each["state"], size, each["requests"], idle, left)
            table.add_row(*(escape(str(cell)) for cell in cells), str(each["priority"]))
            if each.get("reason"):
                notes.append(f"{place}: {each['reason']}")
        if not host.get("responds", True):
            notes.append(f"{place} does not respond")
        elif "budget_bytes" in host:
            used, budget = (f"{host[name] / 2**20:,.0f}" for name in ("used_bytes", "budget_bytes"))
            notes.append(f"{place} uses {used} of {budget} MiB")
    out = stdout_console()
    if table.row_count:
        out.print(table)
    for note in notes:
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    _print_endpoints(hosts)


def _print_endpoints(hosts: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("host", "expert", "endpoint", "state", "again in s", "requests", "answered", "failed")
    for number, host in enumerate(hosts, start=1):
        for each in host.get("endpoints", []):
            opens_in = f"{each['opens_in_s']:.0f}" if each["state"] == "open" else ""
            counts = (each["in_flight"], each["answered"], each["failed"])
            cells = (f"{host.get('pool')} {number}", each["expert"], each["url"], each["state"], opens_in, *counts)
            table.add_row(*(escape(str(cell)) for cell in cells))
    if table.row_count:
        stdout_console().print(table)
