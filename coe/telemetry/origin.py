"""Which HTTP request a call belongs to: on the wire between processes, and in the log lines of each process."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Origin:
    """What a call to an expert carries from its HTTP request.

    Attributes:
        request_id: `x-request-id` of the request.
        key: id of its API key, never the key; "" without one.
        traceparent: W3C trace context of the span that made the call; "" if the request is not traced.
        tracestate: the header of the same name, as the client sent it.
    """

    request_id: str = ""
    key: str = ""
    traceparent: str = ""
    tracestate: str = ""

    def under(self, traceparent: str) -> Origin:
        """The same, with another span as the parent of what follows."""
        return replace(self, traceparent=traceparent)

    @property
    def headers(self) -> dict[str, str]:
        """The W3C headers for a call to another service; none if the request is not traced."""
        if not self.traceparent:
            return {}
        state = {"tracestate": self.tracestate} if self.tracestate else {}
        return {"traceparent": self.traceparent, **state}


@dataclass(slots=True)
class Handled:
    """The request that a task handles, for its log lines.

    Tasks inherit it from the task that starts them. Some live longer than the request, such as those that watch an
    engine which the request had loaded: `over` then ends the attribution of their lines.
    """

    decision_id: str
    request_id: str = ""
    key: str = ""
    traceparent: str = ""
    over: bool = False

    def fields(self) -> dict[str, str]:
        """The ids that are known, as fields of a log line."""
        known = {
            "request_id": self.request_id,
            "decision_id": self.decision_id,
            "key": self.key,
            "trace_id": self.traceparent[3:35],
        }
        return {name: value for name, value in known.items() if value}


_handled: ContextVar[Handled | None] = ContextVar("coe_handled", default=None)


def bind(handled: Handled) -> Handled:
    """Attribute the log lines of this task, and of tasks that it starts, to a request until that is `over`."""
    _handled.set(handled)
    return handled


def handled_now() -> Handled | None:
    """The request whose lines are logged now."""
    handled = _handled.get()
    return None if handled is None or handled.over else handled
