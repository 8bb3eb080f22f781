"""Spans of a call to an expert: at its caller, with the GenAI attributes of OpenTelemetry, and on its host.

    chat NAME            the call, by the orchestrator: `gen_ai.*`
      coe.queue          waiting for admission on the host, if it took LEAST_QUEUE_S
      coe.load           waiting for weights that were not in memory
      coe.generate       the engine, with the event `first_token`

Names: https://github.com/open-telemetry/semantic-conventions-genai. Texts of prompts and answers are in no attribute.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from coe.engines import engine_kind
from coe.telemetry.origin import Origin
from coe.telemetry.tracing import Recorder, Span, recorder
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

LEAST_QUEUE_S: Final = 0.001
"""A request that is admitted sooner has not waited, and gets no span for it."""
FIRST_TOKEN: Final = "first_token"
"""Event of the first text."""
_PROVIDERS: Final[Mapping[str, str]] = {"remote": "openai"}
"""Engine -> `gen_ai.provider.name`, where it is another one: remote endpoints have OpenAI's API."""


class CallSpan:
    """The span of one call to an expert. `request` is the call's, with the span as its parent."""

    def __init__(self, record: Recorder, spec: ExpertSpec, call: str, request: GenerateRequest) -> None:
        origin = request.origin or Origin()
        attributes = _asked(spec, call, request)
        name = f"{attributes['gen_ai.operation.name']} {spec.name}"
        if origin.traceparent:
            self._span = record.child(name, origin.traceparent, attributes, "client")
        else:
            self._span = record.entry(name, "client", attributes)
        self.request = replace(request, origin=origin.under(self._span.traceparent))
        self._finished = False

    def saw(self, chunk: Chunk) -> None:
        """Note the first chunk, and what the last one says."""
        span = self._span
        if not span.events and not chunk.is_empty:
            span.event(FIRST_TOKEN)
            if self.request.stream:
                span.attributes["gen_ai.response.time_to_first_chunk"] = (span.events[0][1] - span.start_ns) / 1e9
        if chunk.finish_reason is not None:
            self._finished = True
            span.attributes["gen_ai.response.finish_reasons"] = (chunk.finish_reason,)
            if chunk.usage is not None:
                span.attributes["gen_ai.usage.input_tokens"] = chunk.usage.prompt_tokens
                span.attributes["gen_ai.usage.output_tokens"] = chunk.usage.completion_tokens

    def failed(self, error: BaseException) -> None:
        """Note the error that ends the call; its caller may leave after the last chunk."""
        if isinstance(error, Exception) or not self._finished:
            self._span.failed(error)

    def end(self) -> None:
        """End the span."""
        self._span.end()


def call_span(experts: Mapping[str, ExpertSpec], expert: str, call: str, request: GenerateRequest) -> CallSpan | None:
    """The span of a call that begins now; None while traces are off. call: its id (`coe.compose`)."""
    record, spec = recorder(), experts.get(expert)
    return None if record is None or spec is None else CallSpan(record, spec, call, request)


class HostSpans:
    """The spans of one call on its host, one after the other."""

    def __init__(self, record: Recorder, spec: ExpertSpec, request: GenerateRequest) -> None:
        self._record, self._spec, self._request = record, spec, request
        self._origin = request.origin or Origin()
        self._absent: Sequence[str] = ()
        self._finished = False
        self._span = self._begin("coe.queue")

    def admitted(self, absent: Sequence[str]) -> None:
        """The scheduler has admitted it. absent: needed weights that are not in memory, as `name@version`."""
        if time.time_ns() - self._span.start_ns >= LEAST_QUEUE_S * 1e9:
            self._span.end()
        self._absent = absent
        self._span = self._begin("coe.load")

    def loaded(self, way_in: Callable[[str], str | None]) -> GenerateRequest:
        """Its weights are leased. Returns the request with the engine's span as its parent."""
        if self._absent:
            self._span.attributes["coe.load.weights"] = tuple(self._absent)
            self._span.attributes["coe.load.ways"] = tuple(way_in(ref) or "" for ref in self._absent)
            self._span.end()
        self._span = self._begin("coe.generate")
        return replace(self._request, origin=self._origin.under(self._span.traceparent))

    async def around(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """The same chunks; however they end, so does the span of that moment."""
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if not self._span.events and not chunk.is_empty:
                        self._span.event(FIRST_TOKEN)
                    self._finished = self._finished or chunk.finish_reason is not None
                    yield chunk
        except BaseException as error:
            if isinstance(error, Exception) or not self._finished:
                self._span.failed(error)
            raise
        finally:
            self._span.end()

    def _begin(self, name: str) -> Span:
        attributes = {"coe.expert": self._spec.ref}
        if self._origin.traceparent:
            return self._record.child(name, self._origin.traceparent, attributes, is_remote=True)
        return self._record.entry(name, "internal", attributes)


def host_spans(spec: ExpertSpec, request: GenerateRequest) -> HostSpans | None:
    """The spans of a call that has reached its host; None while traces are off."""
    record = recorder()
    return None if record is None else HostSpans(record, spec, request)


def _asked(spec: ExpertSpec, call: str, request: GenerateRequest) -> dict[str, Any]:
    """What a call asks for."""
    kind = engine_kind(spec)
    operation = "embeddings" if request.wants == "embedding" else "chat" if request.messages else "text_completion"
    stated = {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.seed": request.seed,
        "gen_ai.request.stream": True if request.stream else None,
        "gen_ai.request.temperature": request.temperature if operation != "embeddings" else None,
    }
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDERS.get(kind, kind),
        "gen_ai.request.model": spec.name,
        "gen_ai.response.model": spec.ref,
        "coe.call": call,
        **{name: value for name, value in stated.items() if value is not None},
    }
