"""Spans of requests, and whether they are recorded: `recorder()` is None while traces are off, which costs one look.

A span is a plain record here. OpenTelemetry's SDK gets it when it ends (`coe.telemetry.export`): its sampler, resource,
batches and exporter are used, but not its own spans in progress, each of which takes twenty times the CPU time of these
(docs/results.md). The parent of a span is always stated, as W3C's `traceparent`: the answer of an expert is an
asynchronous generator, in which a context variable would leak into its caller.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from coe.errors import CoeError

Kind = Literal["server", "client", "internal"]
CANCELLED: Final = "cancelled"
"""Error code of a span whose caller has left."""


@dataclass(slots=True, eq=False)
class Span:
    """One step of a request.

    Attributes:
        trace_id, span_id, parent_id: as W3C's trace context has them; parent_id is 0 for the first span of a trace.
        is_remote: whether the parent is in another process.
        sampled: whether it is exported. One that is not still passes its ids on.
        start_ns, end_ns: nanoseconds since the epoch.
        attributes: never texts of prompts or answers.
        error: code of the error that ended it. is_fault: whether the span failed by it: not if its caller has left,
            nor, for a request over HTTP, if the client was refused.
    """

    recorder: Recorder
    name: str
    kind: Kind
    trace_id: int
    span_id: int
    parent_id: int
    is_remote: bool
    sampled: bool
    tracestate: str
    start_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, int]] = field(default_factory=list)
    end_ns: int = 0
    error: str | None = None
    is_fault: bool = False

    @property
    def traceparent(self) -> str:
        """The W3C header that makes it the parent of another span."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"

    def event(self, name: str) -> None:
        """Note that something happened now."""
        self.events.append((name, time.time_ns()))

    def failed(self, error: BaseException) -> None:
        """Note the error that ends it, by its code: its message may hold text of the request."""
        self.error = code_of(error)
        self.is_fault = self.error != CANCELLED

    def end(self) -> None:
        """Hand it over for export, once."""
        if self.end_ns:
            return
        self.end_ns = time.time_ns()
        if self.sampled:
            if self.error is not None:
                self.attributes["error.type"] = self.error
            self.recorder.export(self)


class Recorder:
    """Makes spans.

    Args:
        export: takes a span that has ended; must not block.
        sample: whether a span is recorded that has no parent in this service: `(span, parent's traceparent)`.
    """

    def __init__(self, export: Callable[[Span], None], sample: Callable[[Span, str], bool]) -> None:
        self.export, self._sample = export, sample

    def entry(self, name: str, kind: Kind, attributes: dict[str, Any], parent: str = "", tracestate: str = "") -> Span:
        """The first span of a request in this service.

        Args:
            parent: the caller's `traceparent`, checked (`coe.telemetry.headers`); "" begins a trace.
        """
        trace_id, parent_id, _ = _parts(parent) if parent else (random.getrandbits(128) or 1, 0, False)
        span = self._span(name, kind, (trace_id, parent_id, True), attributes, tracestate, is_remote=bool(parent))
        span.sampled = self._sample(span, parent)
        return span

    def child(
        self, name: str, parent: str, attributes: dict[str, Any], kind: Kind = "internal", *, is_remote: bool = False
    ) -> Span:
        """A span below another one of this service, which decides whether it is recorded. parent: its traceparent."""
        return self._span(name, kind, _parts(parent), attributes, "", is_remote=is_remote)

    def _span(
        self,
        name: str,
        kind: Kind,
        parent: tuple[int, int, bool],
        attributes: dict[str, Any],
        tracestate: str,
        *,
        is_remote: bool,
    ) -> Span:
        trace_id, parent_id, sampled = parent
        span_id = random.getrandbits(64) or 1
        return Span(
            self,
            name,
            kind,
            trace_id,
            span_id,
            parent_id,
            is_remote,
            sampled,
            tracestate,
            time.time_ns(),
            attributes,
        )


_recorder: Recorder | None = None


def recorder() -> Recorder | None:
    """What records spans in this process; None while traces are off."""
    return _recorder


def record_with(recorder: Recorder | None) -> None:
    """Record spans from now on; None turns traces off."""
    global _recorder
    _recorder = recorder


def code_of(error: BaseException) -> str:
    """The code of an error: OpenAI's style for those of this project, `cancelled`, or the class of another one."""
    if isinstance(error, CoeError):
        return error.code
    return type(error).__name__ if isinstance(error, Exception) else CANCELLED


def _parts(traceparent: str) -> tuple[int, int, bool]:
    """Trace id, span id and whether it is sampled, of a valid traceparent."""
    return int(traceparent[3:35], 16), int(traceparent[36:52], 16), bool(int(traceparent[53:55], 16) & 1)
