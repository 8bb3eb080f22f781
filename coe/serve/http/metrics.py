"""Prometheus metrics of the gateways.

Every gateway process counts its own requests. A scrape reaches one gateway; that gateway collects the pages of all of
them (`pages`, a Serve broadcast) and merges them, each series with the label `gateway`. So the page is complete and
fresh whichever process answers. The series of a process end with it, as for any target; `sum
without (gateway) (rate(...))` is correct across restarts.

The alternative is Ray's own pipeline (`ray.util.metrics`, exported by every node). It works without the dashboard, but
is 10 s stale, computes histogram sums from bucket midpoints instead of values, and buries these series in 0.3 to 1 MB
of others. Ray's metrics of its replicas (`ray_serve_*`) stay on those pages.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from coe.compose import FALLBACK
from coe.errors import CoeError
from coe.serve.http.finished import Finished
from coe.serve.http.host_metrics import host_families
from coe.types import Answer

logger = logging.getLogger(__name__)
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ENDPOINTS: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/route"}
)
"""Known paths; all others share one label, since clients may request any path."""

_SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

Pages = Callable[[], Awaitable[Sequence[bytes]]]
"""Returns the pages of all gateways that respond, the calling one included."""
Hosts = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
"""Returns the state of every expert host."""


class Metrics:
    """The metrics of one process, and the merged page of all of them.

    Label values are bounded: chosen experts and policies only, never client input. No expert is "".

    Args:
        process: value of the label `gateway`; unique among processes on all machines.
        dropped: number of decisions the log has lost; in_flight: number of requests in progress; brownout:
            whether policies are degraded now.
        pages: `Metrics.page` of every gateway; None if this process is the only one.
        hosts: states of the expert hosts, for the gateway that renders the page; None: there are none.
    """

    def __init__(
        self,
        process: str | None = None,
        *,
        dropped: Callable[[], int] = int,
        in_flight: Callable[[], int] = int,
        brownout: Callable[[], bool] = bool,
        pages: Pages | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self._process, self._pages = process or f"{socket.gethostname()}-{os.getpid()}", pages
        self._hosts = hosts
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "coe_requests_total",
            "Finished requests.",
            ("endpoint", "policy", "expert", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter("coe_prompt_tokens_total", "Tokens read.", ("expert",), registry=registry)
        self._completion_tokens = Counter(
            "coe_completion_tokens_total", "Tokens generated.", ("expert",), registry=registry
        )
        self._cost = Counter("coe_cost_usd_total", "USD, for experts with a price.", ("expert",), registry=registry)
        self._abstained = Counter(
            "coe_abstained_total",
            "Decisions in which the router abstained.",
            ("policy",),
            registry=registry,
        )
        self._fallbacks = Counter(
            "coe_fallbacks_total", "Answers by an expert other than the chosen one.", ("policy",), registry=registry
        )
        self._degraded = Counter(
            "coe_degraded_total",
            "Decisions for which an overloaded service gave something up.",
            ("policy",),
            registry=registry,
        )
        self._confidence = self._share("coe_decision_confidence", "Probability that the decision is right.")
        self._ood = self._share(
            "coe_decision_out_of_distribution", "How unlike the training data the prompt is, 0 to 1."
        )
        self._request_s = self._seconds("coe_request_seconds", "From request to end of answer.", "endpoint")
        self._gateway_s = self._seconds("coe_gateway_seconds", "Outside the expert host.", "endpoint")
        self._route_s = self._seconds("coe_route_seconds", "From request to decision.", "policy")
        self._first_s = self._seconds("coe_first_token_seconds", "From request to first text.", "expert")
        self._first_parts = Histogram(
            "coe_first_token_part_seconds",
            "Seconds. Parts of coe_first_token_seconds of streams: gateway, calls, queue, load, engine.",
            ("expert", "part"),
            registry=registry,
            buckets=_SECONDS,
        )
        self._queue_s = self._seconds("coe_queue_seconds", "Waiting for admission on the host.", "expert")
        self._load_s = self._seconds("coe_load_seconds", "Waiting for weights to load; 0 if resident.", "expert")
        self._engine_s = self._seconds("coe_engine_seconds", "Generating.", "expert")
        Gauge("coe_in_flight", "Requests in progress.", registry=registry).set_function(in_flight)
        Gauge("coe_brownout", "1 while policies are degraded.", registry=registry).set_function(
            lambda: float(brownout())
        )
        registry.register(_Dropped(dropped))

    def observe(self, finished: Finished) -> None:
        """Count a finished request."""
        routed, expert = finished.routed, finished.expert or ""
        policy = routed.policy.name if routed and routed.policy else ""
        endpoint = finished.endpoint if finished.endpoint in _ENDPOINTS else "other"
        self._requests.labels(endpoint, policy, expert, str(finished.status)).inc()
        if routed is not None:
            if policy:
                _observe(self._confidence, policy, routed.decision.confidence)
            if routed.inputs is not None and routed.inputs.estimate.ood is not None:
                _observe(self._ood, policy, float(routed.inputs.estimate.ood[0]))
            if routed.notes:
                self._degraded.labels(policy).inc()
            if routed.decision.abstained:
                self._abstained.labels(policy).inc()
            if expert and any(call.partition("#")[0] == FALLBACK for call in finished.done):
                self._fallbacks.labels(policy).inc()
        _observe(self._request_s, endpoint, finished.total_s)
        _observe(self._gateway_s, endpoint, finished.gateway_s)
        _observe(self._route_s, policy, finished.route_s)
        _observe(self._first_s, expert, finished.first_s)
        for part, seconds in finished.first_parts.items():
            self._first_parts.labels(expert, part).observe(seconds)
        self._observe_answer(finished)

    def page(self) -> bytes:
        """The metrics of this process as text; every series has the label `gateway`.

        Takes about 1 ms per expert. Safe on any thread.
        """
        return _text(_labelled(self._registry.collect(), self._process))

    async def render(self) -> tuple[bytes, str]:
        """The merged page of all gateways, and its content type."""
        pages = [await asyncio.to_thread(self.page)] if self._pages is None else await self._pages()
        return join(pages) + await self._of_hosts(), CONTENT_TYPE_PLAIN_0_0_4

    async def _of_hosts(self) -> bytes:
        """The metrics of the hosts; none while they do not respond, which `/health` says."""
        if self._hosts is None:
            return b""
        try:
            states = await self._hosts()
        except CoeError as error:
            logger.warning("the expert hosts do not respond: their metrics are left out", exc_info=error)
            return b""
        return _text(host_families(states))

    def _seconds(self, name: str, documentation: str, label: str) -> Histogram:
        return Histogram(name, f"Seconds. {documentation}", (label,), registry=self._registry, buckets=_SECONDS)

    def _share(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, ("policy",), registry=self._registry, buckets=_SHARES)

    def _observe_answer(self, finished: Finished) -> None:
        """Count the tokens of every expert call, whether or not it became the answer."""
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
    """Merge pages of `Metrics.page`: the series of a name are grouped under one HELP and TYPE.

    Lines are moved, not parsed, which is about fifty times cheaper; the event loop is blocked meanwhile. `coe_gateways`
    is the number of pages: fewer than the number of gateways means that one did not respond.
    """
    families: dict[bytes, tuple[dict[bytes, bytes], list[bytes]]] = {}  # name -> ({HELP, TYPE}, samples)
    for page in pages:
        for line in BytesIO(page):
            if line.startswith(b"# "):
                _, kind, name, _ = line.split(b" ", 3)
                heads, samples = families.setdefault(name, ({}, []))
                heads.setdefault(kind, line)
            else:  # a sample of the name stated before
                samples.append(line)
    answered = GaugeMetricFamily("coe_gateways", "Gateways merged into this page.", value=len(pages))
    lines = (line for heads, samples in families.values() for line in (*heads.values(), *samples))
    return b"".join(lines) + _text([answered])


class _Dropped:
    """A counter whose value is kept elsewhere."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("coe_decisions_dropped", "Decisions the log has lost.", value=self._count())


class _Families:
    """Metric families as a collector for `generate_latest`."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _text(families: Iterable[Metric]) -> bytes:
    return generate_latest(_Families(families))


def _labelled(families: Iterable[Metric], process: str) -> Iterator[Metric]:
    """Each sample with the label of its process, without creation timestamps."""
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


def _observe(histogram: Histogram, label: str, value: float | None) -> None:
    if value is not None and not math.isnan(value):
        histogram.labels(label).observe(value)
