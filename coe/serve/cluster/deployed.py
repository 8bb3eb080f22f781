"""What Ray Serve says of a running service, and what its processes say of themselves.

To be imported once Ray's environment is set: it is read on import.
"""

from __future__ import annotations

import time
from typing import Any, Final

from ray import serve
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from coe.serve.cluster.gateway import APP, GATEWAY

POLL_S: Final = 0.2
TAKEN_S: Final = 15.0
"""Seconds in which gateways should answer by what was pushed."""


def status() -> ApplicationStatusOverview:
    """Of the whole service."""
    return serve.status().applications[APP]


def running(deployment: DeploymentStatusOverview) -> int:
    """How many replicas answer."""
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


def states(deployment: str) -> list[dict[str, Any]]:
    """What the processes of a deployment say of themselves."""
    answers = serve.get_deployment_handle(deployment, APP).broadcast("state").results(return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, dict)]


def behind(generation: int) -> int:
    """How many gateways do not answer by that catalog, after the time that loading its routers may take."""
    ends = time.perf_counter() + TAKEN_S
    while True:
        late = len([state for state in states(GATEWAY) if state["generation"] < generation])
        if not late or time.perf_counter() > ends:
            return late
        time.sleep(POLL_S)


def delete() -> None:
    """Take the service down; what else Serve runs stays."""
    serve.delete(APP)


def gist(message: str) -> str:
    """What matters of Serve's words: the error itself of a traceback, else all of them on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if "Traceback" in message else " ".join(lines)
