"""Export of spans over OTLP, with OpenTelemetry's SDK, if an endpoint is configured.

The standard environment variables hold: OTEL_EXPORTER_OTLP_ENDPOINT and _HEADERS, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_SDK_DISABLED. A request never waits for the export:
spans go into a bounded queue, which a thread of the SDK sends in batches, and are dropped while it is full.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from coe.errors import ConfigError
from coe.telemetry.tracing import Recorder, Span, record_with
from coe.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_S: Final = 1.0
"""Seconds that the spans of a process have to be sent when it stops."""
QUIET_S: Final = 60.0
"""Least seconds between two log lines about spans that cannot be exported."""
INSTALL: Final = "pip install 'composition-of-experts[trace]'"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_theirs = logging.getLogger("opentelemetry")
"""What its packages log, and `_report`: at most one line in QUIET_S (`Seldom`)."""
logger = logging.getLogger(__name__)


def is_wanted(endpoint: str | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are to be exported: an endpoint is set here or in the environment, and nothing disables it.

    Raises:
        ConfigError: another protocol than OTLP over HTTP is asked for, or the packages are missing.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    named = [name for name in _ENDPOINTS if environ.get(name, "").strip()]
    if endpoint is None and not named:
        return False
    protocol = next((value for name in _PROTOCOLS if (value := environ.get(name, "").strip())), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(
            f"traces are exported over OTLP with http/protobuf, and the environment asks for {protocol!r}: unset "
            f"{' and '.join(_PROTOCOLS)}, and name the collector's HTTP port (usually 4318)"
        )
    if not _is_installed():
        asked = "serve.trace_endpoint" if endpoint is not None else named[0]
        raise ConfigError(f"{asked} asks for traces, and OpenTelemetry's exporter is not installed: {INSTALL}")
    return True


def start(endpoint: str | None, process: str, role: str) -> Callable[[], None] | None:
    """Export the spans of this process. Returns what ends it, within FLUSH_S; None if no export is wanted.

    Args:
        endpoint: base URL of an OTLP collector; None takes the environment's.
        process: unique among processes on all machines. role: "gateway" or "host".

    Raises:
        ConfigError: as `is_wanted`.
    """
    if not is_wanted(endpoint):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _log_seldom()
    exporter: SpanExporter = OTLPSpanExporter(endpoint=None if endpoint is None else traces_url(endpoint))
    return record(BatchSpanProcessor(exporter), process, role)


def record(processor: SpanProcessor, process: str, role: str) -> Callable[[], None]:
    """Give the spans of this process to a processor of the SDK. Returns what ends it, within FLUSH_S."""
    from opentelemetry.sdk.trace import TracerProvider

    from coe.telemetry.otel_spans import Converter, resource, sampled_by

    about = resource(process, role)
    provider = TracerProvider(
        resource=about, shutdown_on_exit=False
    )  # else the exit waits 30 s for a hanging collector
    readable = Converter(about, __version__)
    sample = sampled_by(provider.sampler)

    def hand_over(span: Span) -> None:
        try:
            processor.on_end(readable(span))
        except Exception as error:  # no request fails by it
            _report("a span is lost", error)

    def sampled(span: Span, parent: str) -> bool:
        try:
            return sample(span, parent)
        except Exception as error:  # the environment may name one of another package
            _report("the sampler failed", error)
            return False

    record_with(Recorder(hand_over, sampled))

    def stop() -> None:
        record_with(None)
        ending = threading.Thread(target=processor.shutdown, name="coe-trace-end", daemon=True)
        ending.start()
        ending.join(FLUSH_S)

    return stop


def _report(what: str, error: Exception) -> None:
    _theirs.warning("%s: %s: %s", what, type(error).__name__, error)


def traces_url(endpoint: str) -> str:
    """The URL for spans below the base URL of a collector."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def _is_installed() -> bool:
    try:
        return (
            find_spec("opentelemetry.exporter.otlp.proto.http") is not None
            and find_spec("opentelemetry.sdk") is not None
        )
    except ModuleNotFoundError:
        return False


class Seldom(logging.Handler):
    """Passes on at most one record in QUIET_S, with the number of those it has left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock, self._next, self._left_out = clock, float("-inf"), 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        left_out, self._left_out, self._next = self._left_out, 0, now + QUIET_S
        more = f" ({left_out} more messages since the last one)" if left_out else ""
        logger.warning("spans are not exported: %s%s", record.getMessage()[:500], more)


def _log_seldom() -> None:
    """Take what OpenTelemetry's packages log: a collector that is gone would fill the log."""
    if not any(isinstance(handler, Seldom) for handler in _theirs.handlers):
        _theirs.addHandler(Seldom())
    _theirs.propagate = False
