"""Prometheus metrics of the endpoints of remote experts, from the states that hosts report.

An endpoint is its position in the configuration, from 0: URLs are for operators (`coe ps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class EndpointFamilies:
    """The metrics of endpoints, host by host.

    Args:
        host: labels of a host.
    """

    def __init__(self, host: tuple[str, ...]) -> None:
        labels = (*host, "expert", "endpoint")
        self._state = GaugeMetricFamily(
            "coe_remote_endpoint_state", "1 for the state of the circuit breaker.", labels=(*labels, "state")
        )
        self._in_flight = GaugeMetricFamily(
            "coe_remote_endpoint_in_flight", "Requests in progress at the endpoint.", labels=labels
        )
        self._requests = CounterMetricFamily(
            "coe_remote_endpoint_requests", "Requests, by whether they were answered.", labels=(*labels, "outcome")
        )
        self._opened = CounterMetricFamily(
            "coe_remote_endpoint_opened", "How often the endpoint was taken out for failures.", labels=labels
        )

    @property
    def families(self) -> list[Metric]:
        """All of them."""
        return [self._state, self._in_flight, self._requests, self._opened]

    def add(self, host: tuple[str, ...], endpoints: Iterable[Mapping[str, Any]]) -> None:
        """Add the endpoints that a host reports (`coe.host.Host.endpoints`)."""
        for each in endpoints:
            place = (*host, str(each["expert"]), str(each["endpoint"]))
            self._state.add_metric((*place, str(each["state"])), 1.0)
            self._in_flight.add_metric(place, float(each["in_flight"]))
            self._requests.add_metric((*place, "answered"), float(each["answered"]))
            self._requests.add_metric((*place, "failed"), float(each["failed"]))
            self._opened.add_metric(place, float(each["opened"]))
