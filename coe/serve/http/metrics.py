"""Prometheus metrics of the gateways.

Every gateway process counts what it answered itself. A scrape reaches one of them, through Serve's proxy; that one
asks all of them for their page (`pages`, a Serve broadcast) and joins them, each series with the label `gateway`, so
that the page is whole and fresh whichever process is asked. As with any other target, the series of a process end with
it; `sum without (gateway) (rate(...))` is right across restarts.

Ray's own pipeline (`ray.util.metrics`, exported by every node) was the alternative. It works without the dashboard, but
is 10 s stale, gives histogram sums from bucket midpoints rather than from the values, and hides these series among 0.3
to 1 MB of others. What Ray itself knows of its replicas (`ray_serve_*`) is on those pages, unchanged.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Final

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from coe.compose import FALLBACK
from coe.serve.http.finished import Finished
from coe.types import Answer

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ENDPOINTS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/route"})
"""A client may ask for any path: others share one label."""

Pages = Callable[[], Awaitable[Sequence[bytes]]]
"""The pages of all gateways that answer, the asking one included."""


class Metrics:
    """What one process counts, and the page of all of them.

    Labels are bounded: experts and policies are those that were chosen, never what a client wrote. Nobody is "".

    Args:
        process: value of the label `gateway`; it must differ between processes, on all machines.
        dropped: decisions that the log has lost so far; in_flight: requests that are being answered now.
        pages: `Metrics.page` of every gateway; None where there is only this one.
    """

    def __init__(
        self,
        process: str | None = None,
        *,
        dropped: Callable[[], int] = int,
        in_flight: Callable[[], int] = int,
        pages: Pages | None = None,
    ) -> None:
        self._process, self._pages = process or f"{socket.gethostname()}-{os.getpid()}", pages
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "coe_requests_total",
            "Requests that are over.",
            ("endpoint", "policy", "expert", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter("coe_prompt_tokens_total", "Tokens read.", ("expert",), registry=registry)
        self._completion_tokens = Counter(
            "coe_completion_tokens_total", "Tokens written.", ("expert",), registry=registry
        )
        self._cost = Counter("coe_cost_usd_total", "USD, of experts that have a price.", ("expert",), registry=registry)
        self._abstained = Counter(
            "coe_abstained_total",
            "Decisions for the generalist, the router being unsure.",
            ("policy",),
            registry=registry,
        )
        self._fallbacks = Counter(
            "coe_fallbacks_total", "Answers by another than was chosen.", ("policy",), registry=registry
        )
        self._request_s = self._seconds("coe_request_seconds", "From the request to the end of its answer.", "endpoint")
        self._gateway_s = self._seconds("coe_gateway_seconds", "Outside the expert's host.", "endpoint")
        self._route_s = self._seconds("coe_route_seconds", "From the request to the decision.", "policy")
        self._first_s = self._seconds("coe_first_token_seconds", "From the request to the first text.", "expert")
        self._queue_s = self._seconds("coe_queue_seconds", "Waiting to be admitted on the host.", "expert")
        self._load_s = self._seconds("coe_load_seconds", "Waiting for weights; 0 where they were there.", "expert")
        self._engine_s = self._seconds("coe_engine_seconds", "Generating.", "expert")
        Gauge("coe_in_flight", "Requests that are being answered.", registry=registry).set_function(in_flight)
        registry.register(_Dropped(dropped))

    def observe(self, finished: Finished) -> None:
        """Count a request that is over."""
        routed, expert = finished.routed, finished.expert or ""
        policy = routed.policy.name if routed and routed.policy else ""
        endpoint = finished.endpoint if finished.endpoint in _ENDPOINTS else "other"
        self._requests.labels(endpoint, policy, expert, str(finished.status)).inc()
        if routed is not None:
            if routed.decision.abstained:
                self._abstained.labels(policy).inc()
            if expert and FALLBACK in finished.done:
                self._fallbacks.labels(policy).inc()
        _observe(self._request_s, endpoint, finished.total_s)
        _observe(self._gateway_s, endpoint, finished.gateway_s)
        _observe(self._route_s, policy, finished.route_s)
        _observe(self._first_s, expert, finished.first_s)
        self._observe_answer(finished)

    def page(self) -> bytes:
        """What this process counted, as text; every series has the label `gateway`.

        Takes about 1 ms an expert, and may run on any thread.
        """
        return _text(_labelled(self._registry.collect(), self._process))

    async def render(self) -> tuple[bytes, str]:
        """The page of all gateways, and its content type."""
        pages = [await asyncio.to_thread(self.page)] if self._pages is None else await self._pages()
        return join(pages), CONTENT_TYPE_PLAIN_0_0_4

    def _seconds(self, name: str, documentation: str, label: str) -> Histogram:
        return Histogram(name, f"Seconds. {documentation}", (label,), registry=self._registry, buckets=_SECONDS)

    def _observe_answer(self, finished: Finished) -> None:
        """What each expert said that was asked, whether or not it became the answer: all of it was generated."""
        for answer in finished.done.values():
            if not isinstance(answer, Answer):
                continue
            self._prompt_tokens.labels(answer.expert).inc(answer.usage.prompt_tokens)
            self._completion_tokens.labels(answer.expert).inc(answer.usage.completion_tokens)
            if answer.cost_usd is not None:
                self._cost.labels(answer.expert).inc(answer.cost_usd)
            if answer.timing is not None:
                _observe(self._queue_s, answer.expert, answer.timing.queue_s)
                _observe(self._load_s, answer.expert, answer.timing.load_s)
                _observe(self._engine_s, answer.expert, answer.timing.engine_s)


def join(pages: Sequence[bytes]) -> bytes:
    """One page of several that `Metrics.page` gave: the series of a name stand together, under one HELP and TYPE.

    Lines are moved, not parsed, which is some fifty times cheaper: the event loop waits meanwhile. `coe_gateways` says
    how many pages there are: fewer than there should be means that a gateway did not answer.
    """
    families: dict[bytes, tuple[dict[bytes, bytes], list[bytes]]] = {}  # name -> ({HELP, TYPE}, samples)
    for page in pages:
        for line in BytesIO(page):
            if line.startswith(b"# "):
                _, kind, name, _ = line.split(b" ", 3)
                heads, samples = families.setdefault(name, ({}, []))
                heads.setdefault(kind, line)
            else:  # of the name that was stated before
                samples.append(line)
    answered = GaugeMetricFamily("coe_gateways", "Gateways that this page is of.", value=len(pages))
    lines = (line for heads, samples in families.values() for line in (*heads.values(), *samples))
    return b"".join(lines) + _text([answered])


class _Dropped:
    """A counter that another part keeps."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("coe_decisions_dropped", "Decisions that the log has lost.", value=self._count())


class _Families:
    """Families as the collector that `generate_latest` takes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _text(families: Iterable[Metric]) -> bytes:
    return generate_latest(_Families(families))


def _labelled(families: Iterable[Metric], process: str) -> Iterator[Metric]:
    """Each sample with the label of its process, without the times of creation, which nobody asks for."""
    for family in families:
        labelled = _empty(family)
        labelled.samples = [
            sample._replace(labels={**sample.labels, "gateway": process})
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        yield labelled


def _empty(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type)


def _observe(histogram: Histogram, label: str, seconds: float | None) -> None:
    if seconds is not None:
        histogram.labels(label).observe(seconds)
