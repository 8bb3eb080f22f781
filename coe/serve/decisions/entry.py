"""A line of the decision log: a finished request as JSON, and back.

A line holds every input of its decision, so `Entry.inputs.decide()` reproduces it. Floats are written with all digits;
values that JSON cannot express (NaN, infinities) are strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import index
from typing import Any, Final

import numpy as np

from coe.errors import CoeError
from coe.protocol.decision import decision_document, decision_from, json_number, json_numbers
from coe.protocol.reading import switch_document, switch_from, turns_document, turns_from
from coe.routing import DecisionInputs
from coe.serve.http.finished import Finished
from registry.json_text import loads
from routers.base import Estimate, Message, Query, RoutingDecision
from routers.decision import Utility
from routers.errors import RouterError
from routers.selectors import build_selector, selector_document

_KIND: Final = "coe-decision/"
FORMAT: Final = f"{_KIND}1"
"""First field of every line; the number is the version of the layout."""
_BEGINNING: Final = f'{{"format":"{_KIND}'.encode()


class DecisionLogError(CoeError, code="invalid_decision_log"):
    """A decision log cannot be read; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a log, as far as a replay needs it.

    Attributes:
        place: file:line.
        policy: the policy that decided; None if the caller named the expert, or no expert was chosen.
        query: the query; None if the log was written without texts.
        inputs: the inputs of the decision; None if the caller named the expert, or no expert was chosen.
        decision: the logged decision; None if the request was refused before one.
    """

    place: str
    id: str
    model: str
    policy: str | None
    router_digest: str | None
    query: Query | None
    inputs: DecisionInputs | None
    decision: RoutingDecision | None


def encode(finished: Finished, *, texts: bool) -> bytes:
    """The line of a request, newline included. `texts`: include the query's text."""
    return json.dumps(_document(finished, texts), separators=(",", ":"), allow_nan=False, default=str).encode() + b"\n"


def decode(line: bytes, place: str) -> Entry:
    """The entry of a line.

    Raises:
        DecisionLogError: the line is damaged, not of a decision log, or of another version; names `place`.
    """
    try:
        document = loads(line)
    except ValueError as error:
        raise DecisionLogError(f"{place}: this line is damaged: {error}") from error
    _check_format(document, place)
    try:
        return _entry(document, place)
    except (KeyError, TypeError, ValueError, RouterError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DecisionLogError(f"{place}: this line is damaged: {what}") from error


def is_cut(line: bytes) -> bool:
    """Whether the line is incomplete, as a killed writer leaves it."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return _BEGINNING.startswith(line[: len(_BEGINNING)])
    return False  # complete except for its newline


def query_digest(query: Query) -> str:
    """sha256 over the canonical JSON of a query: messages, tools and format."""
    canonical = json.dumps(_texts(query), sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _document(finished: Finished, texts: bool) -> dict[str, Any]:
    routed, answer = finished.routed, finished.answer
    policy = routed.policy if routed else None
    return {
        "format": FORMAT,
        "id": finished.id,
        "time": datetime.fromtimestamp(finished.started_at, UTC).isoformat(timespec="microseconds"),
        "endpoint": finished.endpoint,
        "model": finished.model,
        "key": finished.key,
        "policy": policy.name if policy else None,
        "router_digest": policy.router_digest if policy else None,
        "registry_version": finished.registry_version,
        "query": _query_document(routed.query, texts) if routed else None,
        "inputs": _inputs_document(routed.inputs) if routed and routed.inputs else None,
        "decision": decision_document(routed.decision) if routed else None,
        "expert": finished.expert,
        "status": finished.status,
        "error": finished.error,
        "streamed": finished.streamed,
        "seed": finished.seed,
        "usage": answer.usage.document() if answer else None,
        "cost_usd": None if answer is None else json_number(answer.cost_usd),
        "notes": list(answer.notes) if answer else [],
        "latency_s": _latencies(finished),
    }


def _latencies(finished: Finished) -> dict[str, float | str | None]:
    timing = finished.answer.timing if finished.answer else None
    seconds = {
        "route": finished.route_s,
        "first": finished.first_s,
        "total": finished.total_s,
        "gateway": finished.gateway_s,
        "queue": timing.queue_s if timing else None,
        "load": timing.load_s if timing else None,
        "engine": timing.engine_s if timing else None,
    }
    return {name: json_number(value) for name, value in seconds.items()}


def _query_document(query: Query, texts: bool) -> dict[str, Any]:
    return {
        "digest": query_digest(query),
        "n_messages": len(query.messages),
        "n_characters": sum(len(message.content) for message in query.messages),
        "allowed": None if query.allowed is None else sorted(query.allowed),
        "cost_weight": json_number(query.cost_weight),
        "seed": query.seed,
        "max_tokens": query.max_tokens,
        "raw": query.raw,
        "needs": sorted(query.needs),
        **({} if query.previous is None else {"previous": query.previous}),
        **(_texts(query) if texts else {}),
    }


def _texts(query: Query) -> dict[str, Any]:
    return {
        "messages": [message.document() for message in query.messages],
        "tools": [dict(tool) for tool in query.tools],
        "format": query.format,
    }


def _inputs_document(inputs: DecisionInputs) -> dict[str, Any]:
    estimate = inputs.estimate
    return {
        "experts": estimate.experts,
        "quality": json_numbers(estimate.quality[0]),
        "cost_usd": None if estimate.cost_usd is None else json_numbers(estimate.cost_usd[0]),
        "ood": None if estimate.ood is None else json_number(estimate.ood[0]),
        "label": None if estimate.labels is None else estimate.labels[0],
        "eligible": None if estimate.eligible is None else [bool(value) for value in estimate.eligible[0]],
        "abstained": None if estimate.abstained is None else bool(estimate.abstained[0]),
        "confidence": None if estimate.confidence is None else json_number(estimate.confidence[0]),
        "reason": None if estimate.reasons is None else estimate.reasons[0],
        "truncated": None if estimate.truncated is None else bool(estimate.truncated[0]),
        "weights": None if estimate.weights is None else json_numbers(estimate.weights[0]),
        "utility": {
            "cost_weight": json_number(inputs.utility.cost_weight),
            "latency_weight": json_number(inputs.utility.latency_weight),
            "switch_weight": json_number(inputs.utility.switch_weight),
        },
        "load_s": {name: json_number(seconds) for name, seconds in inputs.load_s.items()},
        "allowed": sorted(inputs.allowed),
        "select": selector_document(inputs.select),
        "seed": inputs.seed,
        "prompt_tokens": dict(inputs.prompt_tokens),
        "fallback": inputs.fallback,
        "why": inputs.why,
        "turns": turns_document(inputs.turns),
        "switch": switch_document(inputs.switch),
        **({"degraded": inputs.degraded} if inputs.degraded else {}),
    }


def _check_format(document: object, place: str) -> None:
    stated = document.get("format") if isinstance(document, dict) else None
    if not isinstance(stated, str) or not stated.startswith(_KIND):
        raise DecisionLogError(f"{place}: not a decision log: lines start with the format {FORMAT!r}")
    if stated != FORMAT:
        raise DecisionLogError(
            f"{place}: a decision log of format {stated!r}, but this version reads {FORMAT!r}: replay it with the "
            "version that wrote it"
        )


def _entry(document: Mapping[str, Any], place: str) -> Entry:
    query, decision = document["query"], document["decision"]
    inputs = None if document["inputs"] is None else _inputs(document["inputs"])
    return Entry(
        place,
        id=document["id"],
        model=document["model"],
        policy=document["policy"],
        router_digest=document["router_digest"],
        query=_query(query) if query is not None and "messages" in query else None,
        inputs=inputs,
        decision=None if decision is None else decision_from(decision),
    )


def _query(document: Mapping[str, Any]) -> Query:
    return Query(
        messages=tuple(Message.of(message) for message in document["messages"]),
        tools=tuple(document["tools"]),
        format=document["format"],
        allowed=None if document["allowed"] is None else frozenset(document["allowed"]),
        cost_weight=None if document["cost_weight"] is None else float(document["cost_weight"]),
        seed=None if document["seed"] is None else index(document["seed"]),
        max_tokens=document.get("max_tokens"),  # this and the next three are absent in lines of earlier builds
        raw=bool(document.get("raw", False)),
        needs=frozenset(document.get("needs", ())),
        previous=document.get("previous"),
    )


def _inputs(document: Mapping[str, Any]) -> DecisionInputs:
    return DecisionInputs(
        _estimate(document),
        utility=_utility(document["utility"]),
        allowed=frozenset(document["allowed"]),
        select=build_selector(document["select"] if "select" in document else {"kind": "top-k", "k": document["k"]}),
        load_s={name: float(seconds) for name, seconds in document["load_s"].items()},
        seed=None if document["seed"] is None else index(document["seed"]),
        prompt_tokens=document.get("prompt_tokens", {}),  # these six are absent in lines of earlier builds
        fallback=document.get("fallback"),
        why=document.get("why", ""),
        turns=turns_from(document.get("turns", ())),
        switch=switch_from(document.get("switch")),
        degraded=document.get("degraded", ""),
    )


def _utility(document: Mapping[str, Any]) -> Utility:
    return Utility(
        float(document["cost_weight"]),
        float(document["latency_weight"]),
        float(document.get("switch_weight", 0.0)),  # absent in lines of earlier builds
    )


def _estimate(document: Mapping[str, Any]) -> Estimate:
    """The logged row."""
    row = {name: None if value is None else [value] for name, value in document.items()}
    cost, ood, eligible, abstained, confidence = (
        row[name] for name in ("cost_usd", "ood", "eligible", "abstained", "confidence")
    )
    label, reason = row["label"], row["reason"]
    truncated, weights = row.get("truncated"), row.get("weights")  # absent in lines of earlier builds
    return Estimate(
        tuple(document["experts"]),
        np.array([document["quality"]], dtype=np.float64),
        cost_usd=None if cost is None else np.array(cost, dtype=np.float64),
        ood=None if ood is None else np.array(ood, dtype=np.float64),
        labels=None if label is None else tuple(label),
        eligible=None if eligible is None else np.array(eligible, dtype=bool),
        abstained=None if abstained is None else np.array(abstained, dtype=bool),
        confidence=None if confidence is None else np.array(confidence, dtype=np.float64),
        reasons=None if reason is None else tuple(reason),
        truncated=None if truncated is None else np.array(truncated, dtype=bool),
        weights=None if weights is None else np.array(weights, dtype=np.float64),
    )
