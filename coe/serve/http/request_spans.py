"""The spans of a request at the gateway, from arrival to the last byte sent, and what its log lines say of it.

POST /v1/chat/completions     server span, `http.*`; it continues the trace of the client's `traceparent`
  coe.route                   the decision: policy, router, experts, confidence
  chat NAME                   each call to an expert (`coe.expert_spans`)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from coe.serve.http.call import CANCELLED, Call
from coe.serve.http.request_ids import request_id
from coe.telemetry.headers import trace_context
from coe.telemetry.origin import Origin
from coe.telemetry.tracing import recorder


@contextmanager
def observed(call: Call, scope: Scope) -> Iterator[None]:
    """Give a call its request id and, where traces are on, its server span, which ends with the block."""
    call.handled.request_id = request_id(scope).decode("ascii")
    record = recorder()
    if record is None:
        yield
        return
    headers = Headers(scope=scope)
    parent, state = trace_context(headers.getlist("traceparent"), headers.getlist("tracestate"))
    attributes = {
        "http.request.method": scope["method"],
        "http.route": call.endpoint,
        "url.path": call.endpoint,
        "url.scheme": scope.get("scheme", "http"),
        "coe.decision_id": call.id,
        "coe.request_id": call.handled.request_id,
    }
    span = call.span = record.entry(f"{scope['method']} {call.endpoint}", "server", attributes, parent, state)
    call.handled.traceparent = span.traceparent
    try:
        yield
    except BaseException:
        span.error = CANCELLED  # the client has disconnected; all else is answered before it gets here
        raise
    finally:
        _end(call)


def _end(call: Call) -> None:
    span = call.span
    assert span is not None
    if call.status:
        span.attributes["http.response.status_code"] = call.status
    if call.handled.key:
        span.attributes["coe.key"] = call.handled.key
    if call.error is not None:
        span.error = call.error
    # A client's error is no fault of the server (OpenTelemetry's rule), but a stream that breaks off is.
    span.is_fault = span.error not in (None, CANCELLED) and not 400 <= call.status < 500
    span.end()


@contextmanager
def routing(call: Call) -> Iterator[None]:
    """The span of the decisions of a call."""
    record = recorder()
    if record is None or call.span is None:
        yield
        return
    span = record.child("coe.route", call.span.traceparent, {})
    try:
        yield
    except BaseException as error:
        span.failed(error)
        raise
    finally:
        if call.decisions:
            routed = call.decisions[0]
            policy, decision = routed.policy, routed.decision
            span.attributes |= {
                "coe.policy": policy.name if policy else "",
                "coe.router": _kind(policy.router) if policy else "direct",
                "coe.experts": tuple(decision.experts),
                "coe.confidence": float(decision.confidence),
                "coe.abstained": decision.abstained,
            }
            if len(call.decisions) > 1:  # the attributes are of the first prompt
                span.attributes["coe.prompts"] = len(call.decisions)
        span.end()


def origin_of(call: Call) -> Origin | None:
    """What the calls to experts carry of this request; None if neither its trace nor its log lines are written."""
    if call.span is None and not call.logs_ids:
        return None
    return Origin(
        request_id=call.handled.request_id,
        key=call.handled.key,
        traceparent=call.span.traceparent if call.span else "",
        tracestate=call.span.tracestate if call.span else "",
    )


def _kind(router: object) -> str:
    return str(getattr(router, "kind", type(router).__name__))
