"""`coe keys create | list | revoke`: the API keys of a service, in the database of its registry."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry_url import RegistryUrl
from registry.priorities import NORMAL, RequestPriority

if TYPE_CHECKING:
    from registry.keys import ApiKey, Limit

app = typer.Typer(no_args_is_help=True)
_DAY_S: Final = 86_400.0
_ALL: Final = "all"


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the key's user or purpose.")],
    expert: Annotated[
        list[str],
        typer.Option(
            "--expert", metavar="NAME", help="Experts that may answer, `*` for any characters; repeatable; else all."
        ),
    ] = [],  # noqa: B006
    policy: Annotated[
        list[str],
        typer.Option("--policy", metavar="NAME", help="Policies that it may ask; repeatable; else all."),
    ] = [],  # noqa: B006
    admin: Annotated[bool, typer.Option("--admin", help="It may make admin calls (load, unload).")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics and all of /health.")] = False,
    limit: Annotated[
        list[str],
        typer.Option(
            "--limit",
            metavar="LIMIT",
            help="Most it may use, such as requests=60/minute, tokens=2000000/day or usd=20/month; repeatable.",
        ),
    ] = [],  # noqa: B006
    priority: Annotated[
        RequestPriority,
        typer.Option(
            "--priority",
            metavar="LEVEL",
            help="The highest priority of its requests: low, normal or high; the default too.",
        ),
    ] = NORMAL,
    days: Annotated[
        float | None, typer.Option("--days", metavar="N", min=0.0, max=36_500.0, help="Days until it ends; else never.")
    ] = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Create an API key and print it to stdout, once: only its hash is stored.

    From the first key on, the service answers requests with a key only.
    """
    from pydantic import ValidationError

    from registry.keys import KeySpec, shown_time
    from registry.store import Registry

    now = time.time()
    ends = None if days is None else now + days * _DAY_S
    try:
        spec = KeySpec(
            name=name,
            experts=tuple(expert) or None,
            policies=tuple(policy) or None,
            admin=admin,
            metrics=metrics,
            expires_at=ends,
            limits=tuple(map(_limit, limit)),
            priority=priority,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    with Registry(registry) as store:
        first_one = not store.api_keys()
        key, text = store.create_api_key(spec, now)
        unknown = _unmatched(expert, store.snapshot().experts)
    if unknown:
        console.print(f"no registered expert is {' or '.join(unknown)} yet", markup=False, highlight=False)
    if first_one:
        console.print("this is the first key: from now on the service answers requests with a key only")
    until = "" if ends is None else f", until {shown_time(ends)}"
    console.print(f"key {key.id} for {name}{until}; it is shown only now:", markup=False, highlight=False)
    if json == "-":
        emit_json(_document(key, now) | {"key": text}, json)
        return
    typer.echo(text)
    emit_json(_document(key, now) | {"key": text}, json)


@app.command("list")
def list_keys(
    usage_url_env: Annotated[
        str | None,
        typer.Option(
            "--usage-url-env",
            metavar="NAME",
            help="Environment variable with the URL of the Redis server that keeps their usage (serve.usage_url_env).",
        ),
    ] = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """List the API keys: what each may be used for and has used of its limits, and whether it is valid."""
    from rich.markup import escape
    from rich.table import Column, Table

    from registry.keys import shown_time
    from registry.store import Registry
    from registry.usage_redis import RedisUsage, usage_url

    now = time.time()
    with ExitStack() as stack:
        store = stack.enter_context(Registry(registry))
        accounts = store if usage_url_env is None else stack.enter_context(RedisUsage(usage_url(usage_url_env)))
        keys = store.api_keys()
        used = {key.id: accounts.used(key, now) for key in keys if key.spec.limits}
    if json != "-":
        heads = ("name", "state", "experts", "policies", "may also", "priority", "limits", "created", "ends")
        table = Table(Column("id", no_wrap=True), *heads)
        for key in keys:
            spec = key.spec
            may = ", ".join(what for what, allowed in (("admin", spec.admin), ("metrics", spec.metrics)) if allowed)
            ends = "never" if spec.expires_at is None else shown_time(spec.expires_at)
            limits = "\n".join(f"{each}: {n:,.6g}" for each, n in zip(spec.limits, used.get(key.id, ()), strict=True))
            cells = (
                key.id,
                spec.name,
                key.state(now),
                _shown(spec.experts),
                _shown(spec.policies),
                may,
                spec.priority,
                limits,
            )
            table.add_row(*(escape(cell) for cell in (*cells, shown_time(key.created_at), ends)))
        if keys:
            stdout_console().print(table)
        else:
            console.print("there are no keys: the service answers all requests (`coe keys create NAME`)")
    emit_json({"keys": [_document(key, now) | {"used": used.get(key.id, [])} for key in keys]}, json)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id or name of the key.")],
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Revoke an API key, for good: every gateway refuses it within two seconds."""
    from registry.store import Registry

    now = time.time()
    with Registry(registry) as store:
        revoked = store.revoke_api_key(key, now)
        left = sum(each.state(now) == "active" for each in store.api_keys())
    console.print(f"revoked the key {revoked.id} of {revoked.spec.name}", markup=False, highlight=False)
    if not left:
        console.print("no key is valid now: the service refuses all requests until there is one")
    emit_json(_document(revoked, now), json)


def _document(key: ApiKey, now: float) -> dict[str, Any]:
    times = {"created_at": key.created_at, "revoked_at": key.revoked_at}
    return {"id": key.id, **key.spec.model_dump(mode="json"), **times, "state": key.state(now)}


def _limit(text: str) -> Limit:
    from pydantic import ValidationError

    from registry.keys import Limit

    what, _, rest = text.partition("=")
    most, _, per = rest.partition("/")
    try:
        return Limit.model_validate({"what": what.strip(), "per": per.strip(), "most": most.replace("_", "")})
    except ValidationError as error:
        raise typer.BadParameter(
            f"{text[:60]!r} is no limit: WHAT=NUMBER/TIME, with requests, tokens or usd a minute, day or month",
            param_hint="--limit",
        ) from error


def _shown(patterns: tuple[str, ...] | None) -> str:
    return _ALL if patterns is None else ", ".join(patterns)


def _unmatched(patterns: list[str], experts: Any) -> list[str]:
    from registry.keys import matches

    if not experts:  # they may be in files
        return []
    return [pattern for pattern in patterns if not any(matches(name, (pattern,)) for name in experts)]
