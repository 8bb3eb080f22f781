"""What a request may use, and what it has used: requests, tokens and USD, for the limits of API keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coe.protocol.parsed import Parsed
from coe.routing import Routed
from coe.serve.http.call import Call
from coe.types import DEFAULT_MAX_TOKENS, Answer, Failure
from registry.usage import Amounts
from routers.constraints import estimate_tokens


def expected(call: Call, parsed: Parsed, decisions: Sequence[Routed]) -> Amounts:
    """What a routed request is expected to use at most: its prompts, and as many new tokens as it allows.

    Every chosen expert counts, whether or not its composition calls it.
    """
    experts, tokens, usd = call.orchestrator.snapshot.experts, 0.0, 0.0
    for routed, request in zip(decisions, parsed.requests, strict=True):
        read = estimate_tokens(routed.query)
        wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        written = 0 if request.inputs else wanted
        for name in routed.decision.experts:
            price = experts[name].price
            tokens += parsed.runs_each * (read + written)
            usd += 0.0 if price is None else parsed.runs_each * price.cost_usd(read, written)
    return {"requests": len(decisions) * parsed.runs_each, "tokens": tokens, "usd": usd}


def spent(call: Call, reserved: Amounts) -> Amounts:
    """What a request has used, by the usage of all its expert calls, also of failed ones if their endpoints counted it.

    Where a client left, or an error ended an answer that had text, its usage is not known: at least what was reserved.
    """
    answers = [outcome for reply in call.replies for outcome in reply.done.values() if isinstance(outcome, Answer)]
    tokens = float(sum(each.usage.prompt_tokens + each.usage.completion_tokens for each in answers))
    usd = sum(each.cost_usd or 0.0 for each in answers)
    for expert, read, written in _failed(call):
        price = call.orchestrator.snapshot.experts[expert].price
        tokens += read + written
        usd += 0.0 if price is None else price.cost_usd(read, written)
    if any(reply.answer is None and reply.expert is not None for reply in call.replies):
        tokens, usd = max(tokens, reserved.get("tokens", 0.0)), max(usd, reserved.get("usd", 0.0))
    return {"tokens": tokens, "usd": usd}


def _failed(call: Call) -> Iterator[tuple[str, int, int]]:
    """Experts that failed, each with the tokens that its endpoints counted (`CoeError.used_tokens`)."""
    for reply in call.replies:
        for outcome in reply.done.values():
            used = getattr(outcome.error, "used_tokens", None) if isinstance(outcome, Failure) else None
            if used is not None:
                yield outcome.expert, *used
