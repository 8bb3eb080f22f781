"""Prometheus metrics of the expert hosts, from the states that they report (`GET /health` shows the same)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from coe.serve.http.endpoint_metrics import EndpointFamilies

_HOST = ("pool", "host")


def host_families(states: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics of hosts with these states. A host that does not respond counts in `coe_hosts` only."""
    count: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    budget = GaugeMetricFamily("coe_host_budget_bytes", "Bytes for weights.", labels=_HOST)
    used = GaugeMetricFamily("coe_host_used_bytes", "Bytes of weights in memory.", labels=_HOST)
    busy = GaugeMetricFamily("coe_host_requests", "Requests at work or waiting on the host.", labels=_HOST)
    loads = CounterMetricFamily("coe_host_loads", "Loads of weights since the host started.", labels=(*_HOST, "expert"))
    endpoints = EndpointFamilies(_HOST)
    for state in states:
        pool = str(state.get("pool", ""))
        responds = state.get("responds", True)
        count[pool, "true" if responds else "false"] += 1
        if not responds or "process" not in state:
            continue
        host = (pool, str(state["process"]))
        budget.add_metric(host, float(state["budget_bytes"]))
        used.add_metric(host, float(state["used_bytes"]))
        busy.add_metric(host, float(state["busy"]))
        for expert, n in state["loads"].items():
            loads.add_metric((*host, expert), float(n))
        endpoints.add(host, state.get("endpoints", ()))
        weights.update((str(each["name"]), str(each["state"])) for each in state["weights"])
    return [
        _counted("coe_hosts", "Expert hosts, by whether they respond.", ("pool", "responds"), count),
        budget,
        used,
        busy,
        loads,
        _counted("coe_weights", "Hosts that have the weights, by state.", ("expert", "state"), weights),
        *endpoints.families,
    ]


def _counted(
    name: str, documentation: str, labels: Iterable[str], counted: Mapping[tuple[str, str], int]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=tuple(labels))
    for values, number in sorted(counted.items()):
        family.add_metric(values, float(number))
    return family
