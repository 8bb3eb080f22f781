"""`coe route`: which expert, or experts, a saved router or a policy chooses for a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.flags import CONFIG_FILE, Allowed, MaxTokens, Text, default_config, text_of
from coe.cli.output import JsonTarget, emit_json, stdout_console
from coe.cli.registry_url import RegistryUrl
from coe.cli.route.conversation import print_conversation
from coe.cli.route.report import print_explanation, route_document
from coe.cli.router.options import SELECTORS_HELP, kind_of, names_of, tell_of_truncation
from coe.cli.router.report import warnings_on_console
from coe.cli.router.signals import query_with_signals

if TYPE_CHECKING:
    from routers.base import Estimate, Message, Query, Router, RoutingDecision
    from routers.kinds.skill.recruiting import Explanation
    from routers.selectors import Selector


def route(
    text: Text,
    router: Annotated[
        Path | None,
        typer.Option(
            "--router",
            metavar="DIR",
            help="Folder of a saved router; with --config, that service's experts compute its signals.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help=f"Configuration of the service (YAML), whose policy decides; by default, without --router, "
            f"{CONFIG_FILE} in the current folder.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="NAME", help="Policy of --config; by default its `default_policy`."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the estimate of every expert.")] = False,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            metavar="NAME[,KEY=VALUE...]",
            help=f"Selector of the experts: {SELECTORS_HELP}; by default the policy's. With --router, by default "
            "recruit if the router weighs experts, else the best expert.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "-k", metavar="K", min=1, help="Most experts to choose; by default the selector's."),
    ] = None,
    allowed: Allowed = None,
    cost_weight: Annotated[
        float | None,
        typer.Option(
            "--cost-weight",
            metavar="W",
            min=0,
            help="Quality (0 to 1) given up per USD; by default the policy's or the saved router's.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    before: Annotated[
        Path | None,
        typer.Option(
            "--history",
            metavar="FILE",
            help="The conversation before the question: a JSON list of messages with `role` and `content`.",
        ),
    ] = None,
    previous: Annotated[
        str | None,
        typer.Option(
            "--previous",
            metavar="EXPERT",
            help="With --history, the expert of the previous turns; by default it is derived from them.",
        ),
    ] = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Show which expert a router, or a policy of a service, chooses for a question. No expert answers it."""
    if router is None and config is None:
        config = default_config(otherwise="name a configuration with --config, or a saved router with --router")
    if policy is not None and router is not None:
        raise typer.BadParameter("it names a policy of --config, without --router", param_hint="--policy")
    if max_tokens is not None and router is not None:
        raise typer.BadParameter("a saved router knows no contexts: use it without --router", param_hint="--max-tokens")
    if previous is not None and (router is not None or before is None):
        raise typer.BadParameter("it goes with --history, without --router", param_hint="--previous")
    asked = _messages(text_of(text), before)
    if router is None:
        assert config is not None
        decided = _by_policy(config, policy, asked, select, top_k, allowed, cost_weight, max_tokens, previous)
    else:
        decided = _by_router(router, asked, select, top_k, allowed, cost_weight, config=config, registry=registry)
    conversation = None if before is None else decided.conversation
    _show(decided, conversation, asked, explain=explain, to_stdout=json != "-")
    document = route_document(decided.estimate, decided.decision, decided.recruiting)
    emit_json(document if conversation is None else {**document, "conversation": conversation}, json)


@dataclass(frozen=True, slots=True)
class _Decided:
    """A decision to show.

    Attributes:
        ranked: it ranks all that may answer, and the first one is chosen.
        removed: expert -> the constraint that excludes it.
        conversation: what was read of the conversation.
        named: the policy names the expert, so no scores were compared.
        composition: kind of the policy's composition. composed: a line for each composed expert that may answer.
    """

    estimate: Estimate
    decision: RoutingDecision
    ranked: bool
    recruiting: Explanation | None
    removed: Mapping[str, str] = field(default_factory=dict)
    conversation: Mapping[str, Any] = field(default_factory=dict)
    named: bool = False
    composition: str | None = None
    composed: Sequence[str] = ()


def _messages(text: str, before: Path | None) -> tuple[Message, ...]:
    """The conversation that ends with the question."""
    from coe.cli.route.conversation import history
    from routers.base import Message

    return (*history(before), Message("user", text))


def _by_policy(
    config: Path,
    policy: str | None,
    messages: tuple[Message, ...],
    select: str | None,
    top_k: int | None,
    allowed: str | None,
    cost_weight: float | None,
    max_tokens: int | None,
    previous: str | None,
) -> _Decided:
    from coe.cli.route.composed import composed_lines
    from coe.cli.route.policy import decide_by_policy
    from coe.policy import Always
    from coe.protocol.reading import conversation_document
    from routers.base import Query

    chosen = None if select is None and top_k is None else _built(select or "top-k", top_k)
    names = names_of(allowed)
    among = None if names is None else frozenset(names)
    query = Query(messages, allowed=among, cost_weight=cost_weight, max_tokens=max_tokens, previous=previous)
    with warnings_on_console():
        found = decide_by_policy(config, policy, query, chosen)
    inputs, decision, eligible = found.inputs, found.routed.decision, found.routed.eligible
    _show_truncation(found.router, query.text)
    called = [*decision.experts, *getattr(found.policy.composition, "experts", ())]
    return _Decided(
        inputs.estimate,
        decision,
        ranked=False,
        recruiting=_recruiting(found.router, found.query),
        removed={**eligible.removed, **eligible.doubtful} if eligible else {},
        conversation=conversation_document(inputs.turns, inputs.switch, inputs.utility, inputs.estimate.experts),
        named=isinstance(found.router, Always),
        composition=found.composition,
        composed=composed_lines(called, found.experts),
    )


def _by_router(
    folder: Path,
    messages: tuple[Message, ...],
    select: str | None,
    top_k: int | None,
    allowed: str | None,
    cost_weight: float | None,
    *,
    config: Path | None,
    registry: str | None,
) -> _Decided:
    from coe.protocol.reading import conversation_document
    from routers.artifacts import load
    from routers.base import Query
    from routers.conversation import read
    from routers.decision import Utility, decide

    with warnings_on_console():
        loaded = load(folder)
    query = query_with_signals(Query(messages), loaded.router.requires, config=config, url=registry)
    seen = read(loaded.router, [query])
    estimate = seen.estimate
    chosen = _selector(select, top_k, estimate)
    utility = Utility(cost_weight=loaded.meta.cost_weight if cost_weight is None else cost_weight)
    ranking = len(estimate.experts) if chosen is None else None
    (decision,) = decide(estimate, utility=utility, allowed=names_of(allowed), select=chosen, k=ranking)
    _show_truncation(loaded.router, query.text)
    conversation = conversation_document(seen.readings[0].turns, None, utility, estimate.experts)
    return _Decided(estimate, decision, chosen is None, _recruiting(loaded.router, query), conversation=conversation)


def _show(
    decided: _Decided,
    conversation: Mapping[str, Any] | None,
    messages: tuple[Message, ...],
    *,
    explain: bool,
    to_stdout: bool,
) -> None:
    if not to_stdout:
        return
    experts = decided.decision.experts[:1] if decided.ranked else decided.decision.experts
    stdout_console().print("\n".join(experts) or "no expert", highlight=False, markup=False)
    if explain:
        if conversation is not None:
            print_conversation(conversation, messages)
        print_explanation(
            decided.estimate,
            decided.decision,
            ranked=decided.ranked,
            recruiting=decided.recruiting,
            removed=decided.removed,
            named=decided.named,
            composition=decided.composition,
            composed=decided.composed,
        )


def _show_truncation(router: Router, text: str) -> None:
    encodes = getattr(router, "encoder", None)
    if encodes is not None:
        tell_of_truncation(encodes, [text])


def _selector(select: str | None, top_k: int | None, estimate: Estimate) -> Selector | None:
    """The selector that the flags name, or `recruit` where the router weighs its experts; None ranks all of them."""
    if select is None and top_k is None and estimate.weights is None:
        return None
    return _built(select or ("top-k" if estimate.weights is None else "recruit"), top_k)


def _built(select: str, top_k: int | None) -> Selector:
    """The selector of `NAME[,KEY=VALUE...]`, with at most `top_k` experts."""
    from routers.selectors import build_selector

    kind, settings = kind_of(select, "--select")
    return build_selector({"kind": kind, **settings}, **({} if top_k is None else {"k": top_k}))


def _recruiting(router: Router, query: Query) -> Explanation | None:
    """The explanation of a skill router; None of another one."""
    explains = getattr(router, "explain", None)
    return None if explains is None else explains(query)
