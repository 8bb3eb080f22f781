"""OpenAI's response bodies: whole answers, chunks of a stream, models.

Bodies are plain dicts, not the models of `openai.types`: those cost 12.5 us per chunk instead of 5.9 us, and 0.9 s of
import in every gateway (docs/results.md). The tests read them with the official client.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from coe.compose.notes import in_order
from coe.policy import AUTO
from coe.protocol.decision import decision_document
from coe.protocol.errors import error_body
from coe.protocol.reading import conversation_document
from coe.routing import DecisionInputs, Routed
from coe.types import Answer, Failure, FinishReason, Usage
from registry.spec import RESERVED_PREFIX, ExpertSpec
from registry.store import Snapshot
from routers.base import Estimate

OWNER = "coe"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Bodies of one answer of `/v1/chat/completions`.

    Attributes:
        id: id of the decision. created: seconds since the epoch. model: the answering expert.
        include_usage: every chunk has a `usage`, null except in the last.
    """

    id: str
    created: int
    model: str
    include_usage: bool = False
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    prefix: ClassVar[str] = "chatcmpl-"

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer in one body."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return _body(self, self.whole_object, [choice]) | {"usage": usage_body(answer.usage)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: the role."""
        return [self._chunk({"role": "assistant", "content": "", "refusal": None})]

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"content": text})

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk with the finish reason."""
        return self._chunk({}, reason)

    def _chunk(self, delta: dict[str, Any], reason: FinishReason | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _chunk(self, [choice])


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """Bodies of one answer of `/v1/completions`; attributes as in ChatAnswer."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl-"

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer in one body."""
        body = _body(self, self.whole_object, [self._choice(answer.text, answer.finish_reason)])
        return body | {"usage": usage_body(answer.usage)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: none."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return _chunk(self, [self._choice(text)])

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk with the finish reason."""
        return _chunk(self, [self._choice("", reason)])

    def _choice(self, text: str, reason: FinishReason | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


AnswerBodies = ChatAnswer | TextAnswer


def usage_chunk(bodies: AnswerBodies, usage: Usage) -> dict[str, Any]:
    """The last chunk of a stream with usage; it has no choices."""
    return _body(bodies, bodies.chunk_object, []) | {"usage": usage_body(usage)}


def usage_body(usage: Usage) -> dict[str, int]:
    """OpenAI's `usage`, with `"estimated": true` if a count is an estimate."""
    return usage.document() | {"total_tokens": usage.prompt_tokens + usage.completion_tokens}


def answers_body(done: Mapping[str, Answer | Failure], *, logged_as: str | None = None) -> list[dict[str, Any]]:
    """The outcome of each expert call, in the order of the calls; `error` has OpenAI's shape, or is null.

    Args:
        done: outcomes by the id of the call.
        logged_as: as in `error_body`.
    """
    return [{"call": call, **_outcome(outcome, logged_as)} for call, outcome in in_order(done)]


def _outcome(outcome: Answer | Failure, logged_as: str | None) -> dict[str, Any]:
    if isinstance(outcome, Answer):
        said = {"text": outcome.text, "finish_reason": outcome.finish_reason, "usage": usage_body(outcome.usage)}
        return {"expert": outcome.expert, **said, "cost_usd": outcome.cost_usd, "error": None}
    nothing = dict.fromkeys(("text", "finish_reason", "usage", "cost_usd"))
    return {"expert": outcome.expert, **nothing, "error": error_body(outcome.error, logged_as=logged_as)[1]["error"]}


def model_list(snapshot: Snapshot, policies: Iterable[str], created: int) -> dict[str, Any]:
    """The body of `/v1/models`: `auto`, policies, experts. created: seconds since the epoch."""
    names = (AUTO, *(RESERVED_PREFIX + policy for policy in policies), *snapshot.experts)
    return {"object": "list", "data": [model_body(name, snapshot, created) for name in names]}


def model_body(name: str, snapshot: Snapshot, created: int) -> dict[str, Any]:
    """One model. The `coe` of an expert holds its kind, limits, and prices in USD per million tokens."""
    spec = snapshot.experts.get(name)
    about = {"kind": "policy"} if spec is None else _about(spec, snapshot)
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER, "coe": about}


def route_body(id: str, routed: Routed, registry_version: int) -> dict[str, Any]:  # OpenAI's word  # noqa: A002
    """The body of `/v1/route`: the decision and its inputs.

    `estimate` holds the expected quality (score in [0, 1]) and cost (USD) of each expert, null where unknown; it is
    null as a whole if the caller named the expert. `removed` and `doubtful` hold the constraint that excludes an expert
    of the router, or may; `prompt_tokens` the counts by the experts' own tokenizers that the constraints used.
    `conversation` holds the user turns that were read with their weights, the expert of the previous turns, and the
    utility that each other expert loses.
    """
    policy, eligible = routed.policy, routed.eligible
    known = routed.inputs.estimate.experts if routed.inputs else ()
    return {
        "object": "coe.route",
        "id": id,
        "policy": policy.name if policy else None,
        "decision": decision_document(routed.decision),
        "estimate": _estimate(routed.inputs.estimate) if routed.inputs else None,
        "allowed": sorted(routed.inputs.allowed) if routed.inputs else list(routed.decision.experts),
        "removed": {e: eligible.removed[e] for e in known if e in eligible.removed} if eligible else {},
        "doubtful": {e: eligible.doubtful[e] for e in known if e in eligible.doubtful} if eligible else {},
        "prompt_tokens": dict(eligible.counted) if eligible else {},
        "conversation": _conversation(routed.inputs) if routed.inputs else None,
        "router_digest": policy.router_digest if policy else None,
        "registry_version": registry_version,
    }


def _conversation(inputs: DecisionInputs) -> dict[str, Any]:
    return conversation_document(inputs.turns, inputs.switch, inputs.utility, inputs.estimate.experts)


def _estimate(estimate: Estimate) -> dict[str, dict[str, float | None]]:
    costs = estimate.cost_usd
    return {
        expert: {
            "quality": _number(estimate.quality[0, j]),
            "cost_usd": None if costs is None else _number(costs[0, j]),
        }
        for j, expert in enumerate(estimate.experts)
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _about(spec: ExpertSpec, snapshot: Snapshot) -> Mapping[str, Any]:
    base = snapshot.experts.get(spec.base) if spec.base else None
    return {
        "kind": spec.kind.value,
        "base": spec.base,
        "context_length": spec.context_length or (base.context_length if base else None),
        "price": spec.price.model_dump() if spec.price else None,
        "capabilities": sorted(spec.capabilities),
        "tags": sorted(spec.tags),
        "description": spec.description,
        "version": spec.version,
    }


def _chunk(bodies: AnswerBodies, choices: list[dict[str, Any]]) -> dict[str, Any]:
    body = _body(bodies, bodies.chunk_object, choices)
    return body | {"usage": None} if bodies.include_usage else body


def _body(bodies: AnswerBodies, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": bodies.prefix + bodies.id,
        "object": kind,
        "created": bodies.created,
        "model": bodies.model,
        "choices": choices,
    }
