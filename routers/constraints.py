"""Constraints: what an expert must be able to do, checked before any score is computed.

Constraints: the caller's allowed experts, drained experts, the modality (`chat`, or `embedding` where vectors are
wanted), the capabilities that the request needs, and the context length, with `max_tokens`. An expert states
capabilities (`ExpertSpec.capabilities`), and so does the engine that serves it: tools and images need both, since a
model must be trained for them; for the others one is enough.

The context is checked with the cheapest figure that decides: bytes (a bound), an estimate (a range), then a count by
the expert's own tokenizer. Only a count excludes an expert. An expert whose context an estimate finds too short is
`doubtful`: it is left out where the router knows another one, else it is called, and its engine counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from registry.spec import ExpertSpec, Kind
from registry.spelling import listing
from routers.base import EMBEDDING, Query
from routers.errors import NoEligibleExpert
from routers.tokens import TokenRange, estimate_range, longest_input, most_tokens

CHAT, TOOLS, JSON, VISION = "chat", "tools", "json", "vision"
JSON_SCHEMA, LOGPROBS, PROMPT_LOGPROBS = "json_schema", "logprobs", "prompt_logprobs"
TOKEN_PROMPTS, SAMPLING = "token_prompts", "sampling"
DRAINED = "drained"
CONTEXT_LENGTH = "context length"
"""Names of constraints."""
_OF_BOTH: Final[Mapping[str, str]] = {TOOLS: "call tools", VISION: "read images"}
"""Capabilities that an expert and its engine must both have."""
_OF_EITHER: Final[Mapping[str, str]] = {
    JSON_SCHEMA: "follow a JSON schema",
    LOGPROBS: "return log-probabilities",
    PROMPT_LOGPROBS: "return log-probabilities of the prompt",
    TOKEN_PROMPTS: "read token ids",
    SAMPLING: "use these sampling options (top_k, min_p, penalties, logit_bias, min_tokens, ignore_eos)",
}
"""Capabilities that an expert or its engine must have."""
_UNKNOWN_ENGINE = frozenset({TOOLS, VISION})
"""What an engine that is not installed here is assumed to do, of what depends on the engine. (`json` does not: experts
are trained to answer in JSON.)"""
LEAST_ROOM = 64
"""Tokens that an answer needs if the request states no `max_tokens`: an expert with less room is doubtful. A vector
needs none."""
_MOST_NAMED = 10
"""Experts that an error names, and reasons that it states."""

Count = Callable[[str], TokenRange | None]
"""Expert -> tokens of a query's prompt by its own tokenizer; `None` where that is not at hand."""


@dataclass(frozen=True, slots=True)
class Eligible:
    """The experts that can answer a query, and why the others cannot.

    Attributes:
        removed: expert -> the first constraint that it fails, as a clause that starts with the name of the constraint.
        doubtful: expert of `experts` -> why the prompt is probably too long for it.
        counted: expert -> tokens of the prompt by its own tokenizer, where an estimate did not decide.
        unsure: experts whose context only their own count can decide; the doubtful ones by an estimate are among them.
    """

    experts: frozenset[str]
    removed: Mapping[str, str]
    doubtful: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()

    def among(self, known: Collection[str]) -> frozenset[str]:
        """The experts to choose from: without the doubtful ones if a router that knows `known` has another."""
        sure = self.experts - frozenset(self.doubtful)
        return self.experts if sure.isdisjoint(known) else sure


def prune(
    queries: Sequence[Query],
    specs: Mapping[str, ExpertSpec],
    *,
    answer_tokens: int | None = None,
    engines: Mapping[str, frozenset[str]] | None = None,
) -> list[frozenset[str]]:
    """The experts that can answer each of n queries, which is the `allowed` of `decide`. Arguments as for `check`.

    Raises:
        NoEligibleExpert: no expert can answer a query; the message lists each constraint with the experts it excludes.
    """
    found = [check(query, specs, answer_tokens=answer_tokens, engines=engines) for query in queries]
    for query, eligible in zip(queries, found, strict=True):
        if not eligible.experts:
            raise no_eligible(query, eligible)
    return [eligible.among(specs) for eligible in found]


def check(
    query: Query,
    specs: Mapping[str, ExpertSpec],
    *,
    answer_tokens: int | None = None,
    engines: Mapping[str, frozenset[str]] | None = None,
    count: Count | None = None,
    drained: Mapping[str, str] | None = None,
) -> Eligible:
    """The experts that can answer a query, and the constraint that excludes each of the others.

    Args:
        specs: name -> expert, bases of adapters included. No other expert is eligible: names in `Query.allowed` that
            are missing here are ignored.
        answer_tokens: room to leave in the context for the answer; by default `Query.max_tokens`.
        engines: expert -> capabilities of the engine that serves it (`tools`, ...); `None` means not checked. An expert
            needs both its own capability and that of its engine.
        count: called for the experts of whose context the estimate cannot tell; `None` counts nothing.
        drained: expert -> why it takes no new queries.
    """
    room = _Room(query, query.max_tokens or 0 if answer_tokens is None else answer_tokens, count)
    removed, doubtful = {}, {}
    for name, spec in specs.items():
        failed, doubt = _failed(query, spec, engines, drained or {}), None
        if failed is None:
            length = context_length(spec, specs)
            if length is not None and length < room.enough:
                failed, doubt = room.check(name, length)
        if failed is not None:
            removed[name] = failed
        elif doubt is not None:
            doubtful[name] = doubt
    return Eligible(frozenset(specs) - frozenset(removed), removed, doubtful, room.counted, frozenset(room.unsure))


def context_length(spec: ExpertSpec, specs: Mapping[str, ExpertSpec]) -> int | None:
    """Tokens of prompt and answer: the shortest context of the expert and of the weights it runs on; `None`: no limit.

    Args:
        specs: name -> expert; those that are missing are ignored.
    """
    if not (spec.base or spec.members):
        return spec.context_length
    inner = (context_length(specs[name], specs) for name in spec.references if name in specs)
    return min((length for length in (spec.context_length, *inner) if length is not None), default=None)


def effective(spec: ExpertSpec, engine: frozenset[str] | None) -> frozenset[str]:
    """The capabilities of an expert that requests can use, those of its engine included.

    Args:
        engine: capabilities of the engine that serves it; `None` if they are not known here.
    """
    if spec.kind is Kind.EMBEDDING or CHAT not in spec.capabilities:
        return spec.capabilities
    names = _UNKNOWN_ENGINE if engine is None else engine
    of_both = spec.capabilities & names & _OF_BOTH.keys()
    of_either = {name for name in (JSON, *_OF_EITHER) if name in spec.capabilities | names}
    implied = {JSON} if JSON_SCHEMA in of_either else set()
    return (spec.capabilities - _OF_BOTH.keys()) | of_both | of_either | implied


def estimate_tokens(query: Query) -> int:
    """Likely number of tokens of the whole conversation, tools included; no tokenizer is loaded."""
    return estimate_range(query).likely


class _Room:
    """Whether a prompt and its answer fit a context. Figures are computed once, and only if needed.

    Of texts to embed the longest one is read: a model reads each by itself.

    Attributes:
        enough: a context of this length surely has room.
    """

    def __init__(self, query: Query, answer_tokens: int, count: Count | None) -> None:
        self.counted: dict[str, int] = {}
        self.unsure: set[str] = set()
        self._query, self._answer, self._count = longest_input(query), answer_tokens, count
        self._least = 0 if query.embeds else LEAST_ROOM
        self.enough = most_tokens(self._query) + (answer_tokens or self._least)
        self._estimate: TokenRange | None = None

    def check(self, expert: str, length: int) -> tuple[str | None, str | None]:
        """Why the expert cannot take the query, or else why it probably cannot."""
        wanted = self._answer or min(self._least, length // 4)
        if self._answer >= length:
            return f"{CONTEXT_LENGTH}: {self._answer} tokens for the answer do not fit its {length}", None
        if self._estimated.high + wanted <= length:
            return None, None
        counted = self._count(expert) if self._count else None
        if counted is None:
            self.unsure.add(expert)
            return None, self._clause("about", self._estimated.likely, length, self._estimated.low + wanted > length)
        self.counted[expert] = counted.low
        too_long = self._clause("at least", counted.low, length, counted.low + max(self._answer, 1) > length)
        return too_long, self._clause("about", counted.likely, length, counted.likely + wanted > length)

    @property
    def _estimated(self) -> TokenRange:
        if self._estimate is None:
            self._estimate = estimate_range(self._query)
        return self._estimate

    def _clause(self, how: str, tokens: int, length: int, applies: bool) -> str | None:
        answer = f" and {self._answer} for the answer" if self._answer else ""
        return f"{CONTEXT_LENGTH}: {how} {tokens} tokens{answer} do not fit its {length}" if applies else None


def _failed(
    query: Query, spec: ExpertSpec, engines: Mapping[str, frozenset[str]] | None, drained: Mapping[str, str]
) -> str | None:
    """The first constraint that an expert fails, the context length aside; the caller's come first."""
    if query.allowed is not None and spec.name not in query.allowed:
        return "allowed experts: the caller does not allow it"
    if spec.name in drained:
        return f"{DRAINED}: {drained[spec.name] or 'it takes no new requests now'}"
    able = spec.capabilities
    if query.embeds:
        return None if EMBEDDING in able else f"modality: it cannot return an {EMBEDDING}"
    if CHAT not in able or spec.kind is Kind.EMBEDDING:
        return f"modality: it cannot {CHAT}"
    engine = _UNKNOWN_ENGINE if engines is None else engines.get(spec.name, _UNKNOWN_ENGINE)
    needs = query.needs | {TOOLS} if query.tools else query.needs
    if not needs and query.format == "text":
        return None
    for name, what in _OF_BOTH.items():
        if name in needs and name not in able:
            return f"{name}: it cannot {what}"
        if name in needs and name not in engine:
            return f"{name}: the engine that serves it cannot {what}"
    either = able | engine
    if query.format == "json" and either.isdisjoint((JSON, JSON_SCHEMA)):
        return f"{JSON}: it does not promise JSON"
    return next((f"{n}: it cannot {what}" for n, what in _OF_EITHER.items() if n in needs and n not in either), None)


def no_eligible(query: Query, eligible: Eligible, known: Collection[str] | None = None) -> NoEligibleExpert:
    """The error for a query that no expert can take: the reason of each expert that the caller allows.

    Args:
        known: the experts to name; by default those that the caller allows.
    """
    asked = frozenset(known or query.allowed or eligible.removed)
    why = {name: clause for name, clause in eligible.removed.items() if name in asked}
    reasons = [_by_reason(why)] if why else []
    if unknown := sorted(asked - frozenset(eligible.removed) - eligible.experts):
        registered = listing([*eligible.removed]) or "none"
        reasons.append(f"{listing(unknown)} (allowed experts: not registered; registered: {registered})")
    which = f"query {query.id}" if query.id else "this query"
    return NoEligibleExpert(
        f"no expert can take {which}: {'; '.join(reasons) or 'none is registered'}",
        constraints={clause.partition(":")[0] for clause in why.values()},
    )


def _by_reason(why: Mapping[str, str]) -> str:
    """`a, b (reason); c (reason)`: each reason once, with its experts."""
    experts: dict[str, list[str]] = {}
    for name, clause in why.items():
        experts.setdefault(clause, []).append(name)
    most = max(1, _MOST_NAMED // len(experts))
    groups = (f"{listing(names, most=most)} ({clause})" for clause, names in experts.items())
    return listing(groups, most=_MOST_NAMED, separator="; ")
