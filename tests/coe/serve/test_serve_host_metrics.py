"""Metrics of the expert hosts, and the Grafana dashboard, which asks for metrics and labels that exist."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_requests import answer, finished, inputs, routed
from prometheus_client.parser import text_string_to_metric_families

from coe.errors import EngineError
from coe.serve.http.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "configs" / "grafana" / "coe.json"
STATES: list[dict[str, Any]] = [
    {
        "pool": "large",
        "process": "m-1",
        "budget_bytes": 100,
        "used_bytes": 60,
        "busy": 3,
        "loads": {"law": 2, "sql": 1},
        "weights": [{"name": "law", "state": "resident"}, {"name": "sql", "state": "loading"}],
        "endpoints": [
            {"expert": "big", "endpoint": 0, "url": "https://a.example/v1", "state": "closed", "in_flight": 2}
            | {"answered": 7, "failed": 0, "opened": 0},
            {"expert": "big", "endpoint": 1, "url": "https://b.example/v1", "state": "open", "in_flight": 0}
            | {"answered": 1, "failed": 5, "opened": 1},
        ],
    },
    {
        "pool": "large",
        "process": "m-2",
        "budget_bytes": 100,
        "used_bytes": 40,
        "busy": 0,
        "loads": {"law": 1},
        "weights": [{"name": "law", "state": "resident"}],
    },
    {"pool": "large", "id": "x", "responds": False},
]


async def hosts() -> list[dict[str, Any]]:
    return STATES


async def rendered(**options: Any) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name of each sample -> its labels and values."""
    metrics = Metrics("g", **options)
    unlike = inputs()
    metrics.observe(finished(routed=routed(made_from=unlike), answer=answer()))
    page, _ = await metrics.render()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_hosts_are_on_the_page_of_the_gateway_that_is_asked() -> None:
    read = await rendered(hosts=hosts)
    one, two = {"pool": "large", "host": "m-1"}, {"pool": "large", "host": "m-2"}
    assert read["coe_host_used_bytes"] == [(one, 60), (two, 40)]
    assert read["coe_host_budget_bytes"] == [(one, 100), (two, 100)]
    assert read["coe_host_requests"] == [(one, 3), (two, 0)]
    assert read["coe_host_loads_total"] == [
        (one | {"expert": "law"}, 2),
        (one | {"expert": "sql"}, 1),
        (two | {"expert": "law"}, 1),
    ]
    assert read["coe_weights"] == [
        ({"expert": "law", "state": "resident"}, 2),
        ({"expert": "sql", "state": "loading"}, 1),
    ]
    assert read["coe_hosts"] == [
        ({"pool": "large", "responds": "false"}, 1),
        ({"pool": "large", "responds": "true"}, 2),
    ]


async def test_endpoints_of_remote_experts_are_shown_by_position_and_never_by_url() -> None:
    read = await rendered(hosts=hosts)
    first, second = ({"pool": "large", "host": "m-1", "expert": "big", "endpoint": each} for each in "01")
    assert read["coe_remote_endpoint_state"] == [(first | {"state": "closed"}, 1), (second | {"state": "open"}, 1)]
    assert read["coe_remote_endpoint_in_flight"] == [(first, 2), (second, 0)]
    assert (second | {"outcome": "failed"}, 5) in read["coe_remote_endpoint_requests_total"]
    assert (second, 1) in read["coe_remote_endpoint_opened_total"]
    page, _ = await Metrics("g", hosts=hosts).render()
    assert b"a.example" not in page


async def test_hosts_that_do_not_respond_leave_the_rest_of_the_page() -> None:
    async def gone() -> list[dict[str, Any]]:
        raise EngineError("no expert host responds")

    read = await rendered(hosts=gone)
    assert "coe_requests_total" in read and not any(name.startswith("coe_host") for name in read)


async def test_how_sure_decisions_are_is_counted_by_policy() -> None:
    read = await rendered()
    [(labels, count)] = read["coe_decision_confidence_count"]
    assert (labels["policy"], count) == ("default", 1)
    [(_, total)] = read["coe_decision_confidence_sum"]
    assert total == pytest.approx(routed(made_from=inputs()).decision.confidence)


async def test_the_dashboard_asks_for_metrics_and_labels_that_are_exported() -> None:
    import numpy as np

    from routers.base import Estimate

    metrics = Metrics("g", hosts=hosts)
    estimate = Estimate(("good",), np.array([[0.9]]), cost_usd=np.array([[0.1]]), ood=np.array([0.2]))
    seen = replace(inputs(estimate=estimate, allowed=frozenset({"good"})), degraded="overloaded")
    unsure = routed(made_from=seen)
    metrics.observe(
        finished(routed=unsure, expert="other", done={"fallback": answer("other")}, first_parts={"gateway": 0.1})
    )
    abstained = type(unsure.decision)(("good",), (1.0,), (0.1,), 0.1, abstained=True)
    metrics.observe(finished(routed=type(unsure)(unsure.query, abstained, unsure.policy, seen, unsure.composition)))
    page, _ = await metrics.render()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) > 20 and len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    used: set[str] = set()
    for expr in asked:
        names = set(re.findall(r"coe_[a-z_]+", expr))
        assert names and names <= labels.keys(), (expr, names - labels.keys())
        used |= names
        wanted = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expr))))
        wanted |= set(re.findall(r"(\w+)!?=", expr))
        assert all(wanted <= labels[name] for name in names), (expr, wanted)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}, "a metric without a panel"
