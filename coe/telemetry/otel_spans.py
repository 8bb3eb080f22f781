"""Spans as OpenTelemetry's SDK reads them. Imports the SDK: only `coe.telemetry.export` imports this, once it is on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.status import Status, StatusCode

from coe.telemetry.tracing import Kind, Span
from coe.version import __version__

SERVICE: Final = "coe"
"""`service.name` where the environment states none."""
_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
}
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_UNSET: Final = Status(StatusCode.UNSET)


def resource(process: str, role: str, environ: Mapping[str, str] = os.environ) -> Resource:
    """What all spans of a process share. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence."""
    own = {"service.version": __version__, "service.instance.id": process, "coe.role": role}
    stated = environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not environ.get("OTEL_SERVICE_NAME", "").strip() and "service.name=" not in stated:
        own["service.name"] = SERVICE
    made = Resource.create({name: value for name, value in own.items() if f"{name}=" not in stated})
    return _HashedOnce(dict(made.attributes or {}), made.schema_url)


class _HashedOnce(Resource):
    """The exporter hashes the resource for every span, which takes a tenth of the time of its encoding."""

    def __init__(self, attributes: dict[str, Any], schema_url: str) -> None:
        super().__init__(attributes, schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Converter:
    """Makes the SDK's spans of those that have ended, whole: its own API would begin each of them at its start."""

    def __init__(self, about: Resource, version: str) -> None:
        self._resource, self._scope = about, InstrumentationScope("coe", version)

    def __call__(self, span: Span) -> ReadableSpan:
        """The span of the SDK."""
        state = TraceState.from_header([span.tracestate]) if span.tracestate else None
        parent = None
        if span.parent_id:
            parent = SpanContext(span.trace_id, span.parent_id, span.is_remote, _SAMPLED, state)
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state),
            parent=parent,
            resource=self._resource,
            attributes={name: value for name, value in span.attributes.items() if _fits(value)},
            events=[Event(name, timestamp=at) for name, at in span.events],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.is_fault else _UNSET,
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def _fits(value: object) -> bool:
    """Whether OTLP has room for an attribute: one larger number, such as a client's limit of tokens, fails a batch."""
    return type(value) is not int or -(2**63) <= value < 2**63


def sampled_by(sampler: Sampler) -> Callable[[Span, str], bool]:
    """The decision of a sampler of the SDK on the first span of a request; those below it follow it."""

    def sample(span: Span, parent: str) -> bool:
        context: Context | None = None
        if parent:
            flags = _SAMPLED if int(parent[53:55], 16) & 1 else _NOT_SAMPLED
            caller = SpanContext(span.trace_id, span.parent_id, True, flags)
            context = set_span_in_context(NonRecordingSpan(caller), Context())
        result = sampler.should_sample(context, span.trace_id, span.name, _KINDS[span.kind], span.attributes)
        return result.decision is Decision.RECORD_AND_SAMPLE

    return sample
