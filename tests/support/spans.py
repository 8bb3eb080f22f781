"""Spans of a test, kept in memory by OpenTelemetry's SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from coe.telemetry.export import record


class Spans:
    """The spans that have ended so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def only(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    async def ended(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """Wait until so many spans of a name have ended: that of a request ends after its last byte."""
        async with asyncio.timeout(30):
            while len(self.named(name)) < count:  # set from within  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return self.named(name)

    def tree(self) -> dict[str, Any]:
        """name -> the tree below it, for one trace in which siblings have different names."""
        ids = {span.context.span_id for span in self.all if span.context}

        def below(parent: int | None) -> dict[str, Any]:
            mine = [s for s in self.all if _parent(s) == parent or (parent is None and _parent(s) not in ids)]
            return {span.name: below(span.context.span_id if span.context else None) for span in mine}

        return below(None)


def _parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


@contextmanager
def recorded() -> Iterator[Spans]:
    """Record the spans of a block."""
    exporter = InMemorySpanExporter()
    stop = record(SimpleSpanProcessor(exporter), "test-1", "gateway")
    try:
        yield Spans(exporter)
    finally:
        stop()
