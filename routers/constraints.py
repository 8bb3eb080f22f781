"""Constraints: what an expert must be able to do, checked before any score is computed.

Constraints: the caller's allowed experts, the modality (`chat`: an embedding model cannot answer), tools (`tools`), a
JSON answer (`json`) - words of `ExpertSpec.capabilities` - and the context length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from registry.spec import ExpertSpec, Kind
from routers.base import Query
from routers.errors import NoEligibleExpert

CHAT, TOOLS, JSON = "chat", "tools", "json"
CONTEXT_LENGTH = "context length"
"""Names of constraints. The context length is checked against an estimate; the engine counts exactly."""
_ENGINE_NEEDS = frozenset({TOOLS})
"""Constraints that also depend on the engine. (`json` does not: experts are trained to answer in JSON.)"""
ASCII_CHARS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
"""Role and separators that a chat template adds around a message."""


@dataclass(frozen=True, slots=True)
class Eligible:
    """The experts that can answer a query, and why the others cannot.

    removed: expert -> the first constraint that it fails, as a clause that starts with the name of the constraint.
    """

    experts: frozenset[str]
    removed: Mapping[str, str]


def prune(
    queries: Sequence[Query],
    specs: Mapping[str, ExpertSpec],
    *,
    answer_tokens: int = 0,
    engines: Mapping[str, frozenset[str]] | None = None,
) -> list[frozenset[str]]:
    """The experts that can answer each of n queries, which is the `allowed` of `decide`. Arguments as for `check`.

    Raises:
        NoEligibleExpert: no expert can answer a query; the message lists each constraint with the experts it excludes.
    """
    return [_some(query, check(query, specs, answer_tokens=answer_tokens, engines=engines)) for query in queries]


def check(
    query: Query,
    specs: Mapping[str, ExpertSpec],
    *,
    answer_tokens: int = 0,
    engines: Mapping[str, frozenset[str]] | None = None,
) -> Eligible:
    """The experts that can answer a query, and the constraint that excludes each of the others.

    Args:
        specs: name -> expert, bases of adapters included. No other expert is eligible: names in `Query.allowed` that
            are missing here are ignored.
        answer_tokens: room to leave in the context for the answer.
        engines: expert -> capabilities of the engine that serves it (`tools`, ...); `None` means not checked. An expert
            needs both its own capability and that of its engine.
    """
    tokens = estimate_tokens(query)
    removed = {}
    for name, spec in specs.items():
        lacks = frozenset[str]() if engines is None else _ENGINE_NEEDS - engines.get(name, _ENGINE_NEEDS)
        failed = next(_failed(query, spec, lacks, _context_length(spec, specs), tokens, answer_tokens), None)
        if failed is not None:
            removed[name] = failed
    return Eligible(frozenset(specs) - frozenset(removed), removed)


def estimate_tokens(query: Query) -> int:
    """Approximate number of tokens of the whole conversation, tools included; no tokenizer is loaded.

    One token per four ASCII characters, one per other character, four per message: close for English prose, somewhat
    low for code and digits, high for most other scripts. The engine counts exactly and rejects what is too long.
    """
    texts = [message.content for message in query.messages]
    texts += [json.dumps(tool, ensure_ascii=False, default=str) for tool in query.tools]
    text = "".join(texts)
    plain = len(text.encode("ascii", "ignore"))
    return math.ceil(plain / ASCII_CHARS_PER_TOKEN) + len(text) - plain + TOKENS_PER_MESSAGE * len(query.messages)


def _failed(
    query: Query, spec: ExpertSpec, lacks: frozenset[str], context_length: int | None, tokens: int, answer_tokens: int
) -> Iterator[str]:
    """The constraints that an expert fails, the caller's first. lacks: capabilities that its engine does not have."""
    if query.allowed is not None and spec.name not in query.allowed:
        yield "allowed experts: the caller does not allow it"
    if spec.kind is Kind.EMBEDDING or CHAT not in spec.capabilities:
        yield f"modality: it cannot {CHAT}"
    if query.tools and TOOLS not in spec.capabilities:
        yield f"{TOOLS}: it cannot call tools"
    if query.tools and TOOLS in lacks:
        yield f"{TOOLS}: the engine that serves it cannot call tools"
    if query.format == "json" and JSON not in spec.capabilities:
        yield f"{JSON}: it does not promise JSON"
    if context_length is not None and tokens + answer_tokens > context_length:
        room = f" and {answer_tokens} for the answer" if answer_tokens else ""
        yield f"{CONTEXT_LENGTH}: about {tokens} tokens{room} do not fit its {context_length}"


def _context_length(spec: ExpertSpec, specs: Mapping[str, ExpertSpec]) -> int | None:
    """Of an adapter that states none, the context length of its base; `None` means no limit."""
    if spec.context_length is None and spec.base is not None and spec.base in specs:
        return specs[spec.base].context_length
    return spec.context_length


def _some(query: Query, eligible: Eligible) -> frozenset[str]:
    if eligible.experts:
        return eligible.experts
    asked = frozenset(eligible.removed) if query.allowed is None else query.allowed
    reasons = [f"{name} ({why})" for name, why in eligible.removed.items() if name in asked]
    if unknown := sorted(asked - frozenset(eligible.removed)):
        registered = ", ".join(eligible.removed) or "none"
        reasons.append(f"{', '.join(unknown)} (allowed experts: not registered; registered: {registered})")
    which = f"query {query.id}" if query.id else "this query"
    raise NoEligibleExpert(
        f"no expert can take {which}: {'; '.join(reasons) or 'none is registered'}",
        constraints={why.partition(":")[0] for name, why in eligible.removed.items() if name in asked},
    )
