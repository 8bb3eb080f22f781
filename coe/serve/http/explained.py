"""What a body says of how its answer came about: the field `coe`, and the body of `/v1/route`."""

from __future__ import annotations

from typing import Any

from coe.protocol.responses import answers_body, route_body
from coe.serve.http.call import Call
from coe.serve.http.exchange import Exchange


def decisions_body(call: Call) -> dict[str, Any]:
    """The decision and its inputs; those of further prompts in a field `others`."""
    version = call.orchestrator.snapshot.version
    first, *others = [
        route_body(call.id_of(i), routed, version, call.visible) for i, routed in enumerate(call.decisions)
    ]
    return {**first, "others": others} if others else first


def explained(exchange: Exchange) -> dict[str, Any]:
    """The field `coe` of an answer, present on request, or if its choices are of several experts.

    `"coe": {"answers": true}` adds the answer of each expert and the notes; `x-coe-debug: true` also adds the decision,
    the experts called, cost and timing.
    """
    call = exchange.call
    assert call.parsed is not None
    experts = {"experts": [reply.expert for reply in call.replies]} if len(call.experts) > 1 else {}
    if not (exchange.debug or call.parsed.answers):
        return {"coe": experts} if experts else {}
    said = {"notes": call.notes, "answers": _answers(call), **experts}
    if not exchange.debug:
        return {"coe": said}
    asked = [expert for reply in call.replies for expert in reply.asked]
    return {"coe": {**decisions_body(call), "asked": asked, **said, **_spent(call)}}


def _answers(call: Call) -> list[dict[str, Any]]:
    """The outcome of each call; of several replies, each with the index of its reply."""
    bodies = [answers_body(reply.done, logged_as=call.id) for reply in call.replies]
    if len(bodies) == 1:
        return bodies[0]
    return [{"reply": i, **outcome} for i, outcomes in enumerate(bodies) for outcome in outcomes]


def _spent(call: Call) -> dict[str, Any]:
    """Cost and seconds; the seconds on the host are those of the first reply."""
    finished = list(call.finished())
    costs = [each.answer and each.answer.cost_usd for each in finished]
    timing = finished[0].answer and finished[0].answer.timing
    return {
        "cost_usd": None if None in costs else sum(cost for cost in costs if cost is not None),
        "timing": {
            "route_s": finished[0].route_s,
            "first_s": finished[0].first_s,
            "total_s": finished[0].total_s,
            "gateway_s": finished[0].gateway_s,
            "queue_s": timing and timing.queue_s,
            "load_s": timing and timing.load_s,
            "engine_s": timing and timing.engine_s,
        },
    }
