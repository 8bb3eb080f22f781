"""Logs and traces of a serving process: set up once at its start, by `serve.log_format` and `serve.trace_endpoint`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from coe.config import ServeConfig
from coe.telemetry.export import start
from coe.telemetry.json_logs import OURS, use_json
from coe.telemetry.origin import Handled, bind
from coe.types import GenerateRequest

SERVE: Final = "ray.serve"
"""Serve's logger: its handlers write the log file of a process."""


def process_name() -> str:
    """The name of this process in metrics and traces, unique among machines."""
    return f"{socket.gethostname()}-{os.getpid()}"


def observe(settings: ServeConfig, role: str) -> Callable[[], None] | None:
    """Set up logs and traces of this process. Returns what ends the traces (`coe.telemetry.export.start`).

    Args:
        role: "gateway" or "host".

    Raises:
        ConfigError: traces are asked for, and cannot be exported.
    """
    if settings.log_format == "json":
        use_json(logging.getLogger(SERVE).handlers)
        log_to_serve(OURS)
    return start(settings.trace_endpoint, process_name(), role)


@contextmanager
def attributed(request: GenerateRequest) -> Iterator[None]:
    """Attribute the log lines of this task, which Serve or a link has made for a call, to its request.

    The block may be that of an asynchronous generator: nothing is restored at its end.
    """
    if (origin := request.origin) is None:
        yield
        return
    handled = bind(Handled(request.id, origin.request_id, origin.key, origin.traceparent))
    try:
        yield
    finally:
        handled.over = True


def log_to_serve(names: Sequence[str]) -> None:
    """Write what these loggers get to the log file of this process: Serve writes only what its own logger gets."""
    handlers = logging.getLogger(SERVE).handlers
    for name in names:
        logger = logging.getLogger(name)
        if handlers and not logger.handlers:
            logger.setLevel(logging.INFO)
            for handler in handlers:
                logger.addHandler(handler)
