"""Response bodies beside the answers themselves: models, decisions, and the outcomes of expert calls."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final

from coe.compose.notes import in_order
from coe.engines import capabilities
from coe.policy import AUTO
from coe.protocol.answers import tool_calls_body, usage_body
from coe.protocol.decision import decision_document
from coe.protocol.errors import error_body
from coe.protocol.reading import conversation_document
from coe.routing import DecisionInputs, Routed
from coe.types import Answer, Failure
from registry.snapshot import of_version
from registry.spec import RESERVED_PREFIX, ExpertSpec
from registry.store import Snapshot
from routers.base import Estimate
from routers.constraints import effective

OWNER = "coe"
_UNKNOWN: Final[Mapping[str, Mapping[str, Any]]] = {}


def answers_body(done: Mapping[str, Answer | Failure], *, logged_as: str | None = None) -> list[dict[str, Any]]:
    """The outcome of each expert call, in the order of the calls; `error` has OpenAI's shape, or is null.

    Args:
        done: outcomes by the id of the call.
        logged_as: as in `error_body`.
    """
    return [{"call": call, **_outcome(outcome, logged_as)} for call, outcome in in_order(done)]


def _outcome(outcome: Answer | Failure, logged_as: str | None) -> dict[str, Any]:
    if isinstance(outcome, Answer):
        said: dict[str, Any] = {"text": outcome.text}
        if outcome.tool_calls:
            said["tool_calls"] = tool_calls_body(outcome.tool_calls)
        said |= {"finish_reason": outcome.finish_reason, "usage": usage_body(outcome.usage)}
        return {"expert": outcome.expert, **said, "cost_usd": outcome.cost_usd, "error": None}
    nothing = dict.fromkeys(("text", "finish_reason", "usage", "cost_usd"))
    return {"expert": outcome.expert, **nothing, "error": error_body(outcome.error, logged_as=logged_as)[1]["error"]}


def model_list(
    snapshot: Snapshot,
    policies: Iterable[str],
    created: int,
    residence: Mapping[str, Mapping[str, Any]] = _UNKNOWN,
    *,
    auto: bool = True,
    visible: frozenset[str] | None = None,
) -> dict[str, Any]:
    """The body of `/v1/models`: `auto`, policies, experts, aliases.

    Args:
        created: seconds since the epoch.
        auto: the caller may ask the default policy.
        visible: the experts that the caller may know; None: all.
        residence: by expert (`coe.protocol.residence`); experts without are not known to be in memory or not.
    """
    experts = [name for name in snapshot.experts if visible is None or name in visible]
    aliases = [name for name in snapshot.aliases if snapshot.resolve(name) in experts]
    names = (*([AUTO] if auto else []), *(RESERVED_PREFIX + policy for policy in policies), *experts, *aliases)
    engines = capabilities(snapshot.experts)
    return {"object": "list", "data": [_model(name, snapshot, engines, created, residence) for name in names]}


def model_body(
    name: str, snapshot: Snapshot, created: int, residence: Mapping[str, Mapping[str, Any]] = _UNKNOWN
) -> dict[str, Any]:
    """One model. The `coe` of an expert holds its kind, limits, and prices in USD per million tokens.

    `capabilities`: those of the expert and of the engine that serves it. `drained`: why it takes no new requests. That
    of an alias is of the expert behind it, with `alias`, which names that expert with its version.
    """
    return _model(name, snapshot, capabilities(snapshot.experts), created, residence)


def _model(
    name: str,
    snapshot: Snapshot,
    engines: Mapping[str, frozenset[str]],
    created: int,
    residence: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    expert = snapshot.resolve(name)
    spec = snapshot.experts.get(expert)
    about: dict[str, Any] = {"kind": "policy"} if spec is None else dict(_about(spec, snapshot, engines.get(expert)))
    if spec is not None and expert in residence:
        about["residence"] = residence[expert]
    if expert in snapshot.drained:
        about["drained"] = snapshot.drained[expert]
    if name in snapshot.aliases:
        about["alias"] = snapshot.aliases[name].ref
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER, "coe": about}


def route_body(
    id: str,  # OpenAI's word  # noqa: A002
    routed: Routed,
    registry_version: int,
    visible: frozenset[str] | None = None,
) -> dict[str, Any]:
    """The body of `/v1/route`: the decision and its inputs, of the experts that the caller may know (None: all).

    `estimate` holds the expected quality (score in [0, 1]) and cost (USD) of each expert, null where unknown; it is
    null as a whole if the caller named the expert. `utility` holds the weights of cost, latency and switches, and the
    utility of each expert, by which it is ranked. `removed` and `doubtful` hold the constraint that excludes an expert
    of the router, or may; `prompt_tokens` the counts by the experts' own tokenizers that the constraints used.
    `conversation` holds the user turns that were read with their weights, the expert of the previous turns, and the
    utility that each other expert loses.
    """
    policy, eligible = routed.policy, routed.eligible
    experts = routed.inputs.estimate.experts if routed.inputs else ()
    known = {name: None for name in experts if visible is None or name in visible}  # in order
    return {
        "object": "coe.route",
        "id": id,
        "policy": policy.name if policy else None,
        "decision": decision_document(routed.decision),
        "estimate": _estimate(routed.inputs.estimate, known) if routed.inputs else None,
        "utility": _utility(routed.inputs, known) if routed.inputs else None,
        "allowed": sorted(routed.inputs.allowed) if routed.inputs else list(routed.decision.experts),
        "removed": {e: eligible.removed[e] for e in known if e in eligible.removed} if eligible else {},
        "doubtful": {e: eligible.doubtful[e] for e in known if e in eligible.doubtful} if eligible else {},
        "prompt_tokens": {e: n for e, n in eligible.counted.items() if visible is None or e in visible}
        if eligible
        else {},
        "conversation": _conversation(routed.inputs, known) if routed.inputs else None,
        "router_digest": policy.router_digest if policy else None,
        "registry_version": registry_version,
    }


def _conversation(inputs: DecisionInputs, known: Iterable[str]) -> dict[str, Any]:
    return conversation_document(inputs.turns, inputs.switch, inputs.utility, known)


def _estimate(estimate: Estimate, known: Collection[str]) -> dict[str, dict[str, float | None]]:
    costs = estimate.cost_usd
    return {
        expert: {
            "quality": _number(estimate.quality[0, j]),
            "cost_usd": None if costs is None else _number(costs[0, j]),
        }
        for j, expert in enumerate(estimate.experts)
        if expert in known
    }


def _utility(inputs: DecisionInputs, known: Collection[str]) -> dict[str, Any]:
    utilities = {expert: _number(value) for expert, value in inputs.utilities().items() if expert in known}
    return {**asdict(inputs.utility), "experts": utilities}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _about(spec: ExpertSpec, snapshot: Snapshot, engine: frozenset[str] | None) -> Mapping[str, Any]:
    base = snapshot.experts.get(spec.base) if spec.base else None
    return {
        "kind": spec.kind.value,
        "base": spec.base,
        "context_length": spec.context_length or (base.context_length if base else None),
        "price": spec.price.model_dump() if spec.price else None,
        "capabilities": sorted(effective(spec, engine)),
        "tags": sorted(spec.tags),
        "description": spec.description,
        "version": of_version(spec).version,
    }
