"""The state of a running service: as Ray Serve reports it, and as its processes report it.

Import after Ray's environment variables are set; Ray reads them on import.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from coe.serve.cluster.gateway import APP, GATEWAY

POLL_S: Final = 0.2
TAKEN_S: Final = 15.0
"""Seconds within which gateways should use a pushed catalog."""


def status() -> ApplicationStatusOverview:
    """Status of the application."""
    return serve.status().applications[APP]


def running(deployment: DeploymentStatusOverview) -> int:
    """Number of running replicas."""
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


def states(deployment: str) -> list[dict[str, Any]]:
    """State of each process of a deployment that responds in time."""
    asked = serve.get_deployment_handle(deployment, APP).broadcast("state")
    try:
        answers = asked.results(timeout_s=TAKEN_S, return_exceptions=True)
    except TimeoutError:
        return []
    return [answer for answer in answers if isinstance(answer, dict)]


def show_warnings(warnings: Sequence[str]) -> None:
    """Show warnings in the `/health` of every gateway that runs now and responds."""
    shown = serve.get_deployment_handle(GATEWAY, APP).broadcast("show_warnings", list(warnings))
    with suppress(TimeoutError, RayServeException, RayError):
        shown.results(timeout_s=TAKEN_S, return_exceptions=True)


def behind(generation: int) -> int:
    """Number of gateways without that catalog, after the time that loading its routers may take."""
    ends = time.perf_counter() + TAKEN_S
    while True:
        late = len([state for state in states(GATEWAY) if state["generation"] < generation])
        if not late or time.perf_counter() > ends:
            return late
        time.sleep(POLL_S)


def delete() -> None:
    """Delete the application; other applications of Serve stay."""
    serve.delete(APP)


def gist(message: str) -> str:
    """The essence of a message from Serve: the error at the end of a traceback, otherwise the message on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if "Traceback" in message else " ".join(lines)
