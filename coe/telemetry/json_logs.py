"""Log records as JSON lines, with the ids of the request that is handled. structlog is imported by the functions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Final, Literal

from coe.telemetry.origin import handled_now

LogFormat = Literal["text", "json"]
MOST_EVENT: Final = 10_000
"""Most characters of a message; a traceback has ten times as many."""
OURS: Final = ("coe", "routers", "registry")
"""Loggers of this project."""
_IDS: Final = ("request_id", "deployment", "replica")
"""Attributes that Ray Serve's filters give a record."""
_writes_json = False


def writes_json() -> bool:
    """Whether this process writes its log as JSON lines."""
    return _writes_json


def formatter() -> logging.Formatter:
    """A formatter for any handler: one JSON object a line.

    Fields: `time` (ISO 8601, UTC), `level`, `logger`, `event`; `request_id`, `decision_id`, `key` and `trace_id` where
    they are known; those of `extra={"fields": {...}}`; `exception` with a traceback.
    """
    import structlog

    shared: list[Callable[[Any, str, MutableMapping[str, Any]], MutableMapping[str, Any]]] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _add_fields,
        structlog.processors.format_exc_info,
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[_ordered, structlog.processors.JSONRenderer(serializer=_dumps)],
    )


def use_json(handlers: Iterable[logging.Handler]) -> None:
    """Write the records of these handlers as JSON lines from now on."""
    global _writes_json
    _writes_json = True
    lines = formatter()
    for handler in handlers:
        target = getattr(handler, "target", None)  # of a handler that only collects records for it
        (target if isinstance(target, logging.Handler) else handler).setFormatter(lines)


def use_text() -> None:
    """Forget `use_json`, for tests; formatters stay."""
    global _writes_json
    _writes_json = False


def _add_fields(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The ids of the request, and the fields that the record states, which take precedence."""
    record: logging.LogRecord = event["_record"]
    for name in _IDS:
        if (value := getattr(record, name, None)) is not None:
            event[name] = str(value)
    if (handled := handled_now()) is not None:
        event.update(handled.fields())
    fields = getattr(record, "fields", None)
    if isinstance(fields, dict):
        event.update(fields)
    return event


def _ordered(logger: Any, method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """The same without structlog's own entries, the main fields first, and long texts cut."""
    first = {name: event.get(name) for name in ("time", "level", "logger", "event")}
    first["event"] = _cut(str(first["event"]), MOST_EVENT)
    rest = {name: value for name, value in event.items() if name not in first and not name.startswith("_")}
    if "exception" in rest:
        rest["exception"] = _cut(str(rest["exception"]), 10 * MOST_EVENT)
    return first | rest


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _dumps(event: Any, **_: Any) -> str:
    """ASCII, since a message may hold lone surrogates; no line breaks."""
    return json.dumps(event, default=str)
