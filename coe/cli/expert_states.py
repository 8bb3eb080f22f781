"""`coe drain | undrain | pin | unpin`: the experts of a running service, by its admin calls."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coe.cli.flags import ApiKeyEnv
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.progress import status
from coe.cli.weights import DEFAULT_URL, LONG_S, Names, Url, call_admin


def drain(
    names: Names,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why, in a line; clients that name the expert read it.")
    ] = "",
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds to wait for requests in progress.")
    ] = 30.0,
    url: Url = DEFAULT_URL,
    api_key_env: ApiKeyEnv = None,
    json: JsonTarget = None,
) -> None:
    """Let experts of a running service take no new requests, until `coe undrain`.

    Waits for those in progress; exit status 1 if some are left when the time is over.
    """
    with status(f"draining {', '.join(names)}"):
        query = {"expert": names, "reason": [reason], "wait_s": [f"{wait:g}"]}
        done = call_admin(url, "POST", "drain", query, api_key_env, wait + LONG_S, field="requests", kind=int)
    left = done["requests"]
    _print(f"drained {', '.join(names)}" + (f"; requests in progress: {left}" if left else ""))
    emit_json(done, json)
    if left:
        raise typer.Exit(1)


def undrain(names: Names, url: Url = DEFAULT_URL, api_key_env: ApiKeyEnv = None, json: JsonTarget = None) -> None:
    """Let drained experts of a running service take requests again."""
    done = call_admin(url, "POST", "undrain", {"expert": names}, api_key_env, LONG_S, field="drained", kind=bool)
    _print(f"{', '.join(names)}: takes requests again")
    emit_json(done, json)


def pin(names: Names, url: Url = DEFAULT_URL, api_key_env: ApiKeyEnv = None, json: JsonTarget = None) -> None:
    """Load experts on a running service and keep them in memory, across restarts, until `coe unpin`."""
    with status(f"loading {', '.join(names)}"):
        done = call_admin(url, "POST", "pin", {"expert": names}, api_key_env, LONG_S, field="served", kind=bool)
    _print(f"pinned {', '.join(names)}{_not_served(done)}")
    emit_json(done, json)


def unpin(names: Names, url: Url = DEFAULT_URL, api_key_env: ApiKeyEnv = None, json: JsonTarget = None) -> None:
    """Undo `coe pin`: the experts stay in memory until their room is needed."""
    done = call_admin(url, "POST", "unpin", {"expert": names}, api_key_env, LONG_S, field="served", kind=bool)
    _print(f"unpinned {', '.join(names)}{_not_served(done)}")
    emit_json(done, json)


def _not_served(done: dict[str, Any]) -> str:
    return "" if done["served"] else "; not every gateway has taken that yet: see `coe doctor`"


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False)
