"""`coe ask`: one answer, in this process, streamed to stdout; the expert and the reason go to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.flags import (
    SERVICE_CONFIG,
    Allowed,
    MaxTokens,
    SamplingSeed,
    ServiceConfig,
    Temperature,
    Text,
    text_of,
)
from coe.cli.output import JsonTarget, console, emit_json, show_answer
from coe.cli.progress import status

if TYPE_CHECKING:
    from coe.config import Config
    from coe.orchestrator import Reply
    from coe.types import GenerateRequest
    from routers.base import Query


def ask(
    text: Text,
    config: ServiceConfig = SERVICE_CONFIG,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="'auto', 'coe/POLICY', or an expert.")
    ] = "auto",
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="P", help="Nucleus mass in (0, 1].")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before this string. Repeatable.")
    ] = None,
    seed: SamplingSeed = None,
    allowed: Allowed = None,
    cost_weight: Annotated[
        float | None,
        typer.Option(
            "--cost-weight", metavar="W", min=0, help="Quality (0 to 1) given up per USD; by default the policy's."
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="SECONDS", help="Seconds after which the request fails.")
    ] = None,
    json_target: JsonTarget = None,
) -> None:
    """Ask one question; the answer of the chosen expert streams to stdout."""
    import asyncio

    from coe.config import load_config
    from coe.types import GenerateRequest
    from routers.base import Message, Query

    question = text_of(text)
    messages = (*([Message("system", system)] if system else []), Message("user", question))
    request = GenerateRequest(
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=tuple(stop or ()),
        seed=seed,
        deadline_s=deadline,
    )
    names = frozenset(name.strip() for name in allowed.split(",")) if allowed is not None else None
    query = Query(messages=messages, allowed=names, cost_weight=cost_weight)
    asyncio.run(_ask(load_config(config), request, query, model, json_target))


async def _ask(config: Config, request: GenerateRequest, query: Query, model: str, json_target: str | None) -> None:
    import time
    from contextlib import aclosing

    from coe.local import open_local

    started = time.perf_counter()
    first_s = 0.0
    async with open_local(config) as system:
        reply = system.answer(request, model=model, query=query)
        async with aclosing(reply.chunks) as chunks:  # a broken pipe ends the answer before its expert is unloaded
            with status(f"{', '.join(reply.decision.experts)}: loading"):
                first = await anext(chunks)
            first_s = time.perf_counter() - started
            _show(first.text, json_target)
            async for chunk in chunks:
                _show(chunk.text, json_target)
        if json_target != "-":
            typer.echo()
        seconds = time.perf_counter() - started
    _explain(reply, first_s, seconds)
    emit_json(_as_json(reply), json_target)


def _show(text: str, json_target: str | None) -> None:
    """Stream to stdout, unless stdout is promised to the JSON."""
    if json_target != "-":
        show_answer(text)


def _explain(reply: Reply, first_s: float, seconds: float) -> None:
    from coe.compose import FALLBACK

    answer, decision = reply.answer, reply.decision
    assert answer is not None  # the chunks ended without an error
    cost = "" if answer.cost_usd is None else f", ${answer.cost_usd:.2g}"
    took = f"{answer.usage.completion_tokens} tokens{cost}, first after {first_s:.1f} s, done after {seconds:.1f} s"
    by = f"policy {reply.policy}" if reply.policy else "you"
    why = decision.reason + ("; the fallback answered" if FALLBACK in reply.done else "")
    console.print(f"[bold]{answer.expert}[/] ({took})\nchosen by {by}, confidence {decision.confidence:.2f}: {why}")
    if len(reply.asked) > 1:
        console.print(f"called: {', '.join(reply.asked)}", highlight=False, markup=False)
    for note in answer.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _as_json(reply: Reply) -> dict[str, Any]:
    answer, decision = reply.answer, reply.decision
    assert answer is not None
    return {
        "expert": answer.expert,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage.document(),
        "cost_usd": answer.cost_usd,
        "notes": answer.notes,
        "asked": reply.asked,
        "policy": reply.policy,
        "decision": decision,
    }
