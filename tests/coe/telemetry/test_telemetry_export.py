"""Export of traces: what turns it on, what a collector receives, and that a bad one slows nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from api_server import gateway
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from coe.config import ServeConfig
from coe.errors import ConfigError
from coe.telemetry import export
from coe.telemetry.export import QUIET_S, Seldom, is_wanted, start
from coe.telemetry.headers import trace_context
from coe.telemetry.tracing import recorder

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    theirs = logging.getLogger("opentelemetry")
    before = theirs.handlers[:], theirs.propagate
    yield
    theirs.handlers, theirs.propagate = before


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, str | None, ExportTraceServiceRequest]]]]:
    """A collector: its URL, and what it has received: path, a header, the spans."""
    received: list[tuple[str, str | None, ExportTraceServiceRequest]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, self.headers.get("x-team"), ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def ask_once() -> float:
    """Seconds of a request."""
    async with gateway() as served:
        began = time.perf_counter()
        await served.client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "private"}])
        return time.perf_counter() - began


async def test_a_collector_receives_the_spans_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "experts")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=a")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with collector() as (url, received):
        monkeypatch.setenv(ENDPOINT, url)
        stop = start(None, "machine-1", "gateway")
        assert stop is not None
        await ask_once()
        await asyncio.to_thread(stop)  # what is left is sent
    path, team, request = received[0]
    assert path == "/v1/traces" and team == "a" and recorder() is None
    [resource] = request.resource_spans
    stated = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert stated["service.name"] == "experts" and stated["deployment.environment.name"] == "test"
    assert stated["service.instance.id"] == "machine-1" and stated["coe.role"] == "gateway"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert {"POST /v1/chat/completions", "coe.route", "chat echo", "coe.load", "coe.generate"} <= spans.keys()
    assert spans["coe.generate"].parent_span_id == spans["chat echo"].span_id
    assert spans["coe.generate"].events[0].name == "first_token"
    assert b"private" not in request.SerializeToString()


async def test_what_cannot_be_exported_fails_neither_a_request_nor_the_other_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with collector() as (url, received):
        stop = start(url, "machine-1", "gateway")
        record = recorder()
        assert stop is not None and record is not None
        for value in (2**63, {"no": "attribute"}, object(), "\ud800"):
            record.entry("odd", "internal", {"coe.odd": value}).end()
        record.entry("plain", "internal", {"coe.n": 2**63 - 1}).end()
        monkeypatch.setattr("coe.telemetry.otel_spans.Converter.__call__", lambda *_: 1 / 0)
        record.entry("lost", "internal", {}).end()
        await asyncio.to_thread(stop)
    names = [span.name for _, _, sent in received for each in sent.resource_spans[0].scope_spans for span in each.spans]
    assert names.count("plain") == 1 and names.count("odd") >= 1 and "lost" not in names


async def test_a_sampler_of_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    with collector() as (url, received):
        stop = start(url, "machine-1", "gateway")
        assert stop is not None
        await ask_once()
        await asyncio.to_thread(stop)
    assert received == []


@pytest.mark.parametrize("answers", [False, True], ids=["gone", "hangs"])
async def test_a_collector_that_is_gone_or_hangs_slows_neither_requests_nor_the_end(
    answers: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if not answers:
            silent.close()
        stop = start(url, "machine-1", "gateway")
        assert stop is not None
        async with gateway() as served:
            for _ in range(3):
                answer = await served.client.chat.completions.create(
                    model="echo", messages=[{"role": "user", "content": "a"}], timeout=5
                )
                assert answer.choices[0].message.content == "a"
        began = time.perf_counter()
        await asyncio.to_thread(stop)
        assert time.perf_counter() - began < export.FLUSH_S + 2


def test_failures_are_logged_at_most_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = logging.getLogger("test.seldom")
    log.propagate, log.handlers = False, [Seldom(lambda: now[0])]
    for at in (0.0, 1.0, QUIET_S - 1, QUIET_S, QUIET_S + 1):
        now[0] = at
        log.warning("no connection at %g", at)
        log.debug("details")
    told = [record.getMessage() for record in caplog.records if record.name == "coe.telemetry.export"]
    assert told == [
        "spans are not exported: no connection at 0",
        f"spans are not exported: no connection at {QUIET_S:g} (2 more messages since the last one)",
    ]


def test_only_an_endpoint_turns_traces_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wanted(None, {}) and not is_wanted(None, {ENDPOINT: " "}) and start(None, "m", "host") is None
    assert is_wanted("http://127.0.0.1:4318", {}) and is_wanted(None, {ENDPOINT: "http://a:4318"})
    assert is_wanted(None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:4318/v1/traces"})
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert not is_wanted("http://127.0.0.1:4318", off)
    with pytest.raises(ConfigError, match=r"asks for 'grpc': unset .*4318"):
        is_wanted(None, {ENDPOINT: "http://a:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    monkeypatch.setattr(export, "_is_installed", lambda: False)
    with pytest.raises(ConfigError, match=rf"{ENDPOINT} asks .* pip install 'composition-of-experts\[trace\]'"):
        is_wanted(None, {ENDPOINT: "http://a:4318"})


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://a", "http://", "http://u:secret@a:4318", "http://a?x=1"])
def test_an_endpoint_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="trace_endpoint") as refused:
        ServeConfig(trace_endpoint=url)
    assert "OTEL_EXPORTER_OTLP_HEADERS" in str(refused.value) or "base URL" in str(refused.value)


def test_nothing_is_imported_while_all_is_off() -> None:
    code = (
        "import sys, asyncio\n"
        "import coe.serve.http.api, coe.host, coe.orchestrator, coe.engines.remote.engine, coe.cli.app\n"
        "from coe.telemetry.export import start\n"
        "assert start(None, 'm', 'gateway') is None\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'structlog')))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later", True),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("", False),
        ("0" * 100_000, False),
    ],
)
def test_a_traceparent_is_taken_as_the_standard_says(sent: str, taken: bool) -> None:
    parent, state = trace_context([sent], ["a=1", "b=2"])
    assert (parent, state) == ((f"00-{sent[3:55]}", "a=1,b=2") if taken else ("", ""))
    assert trace_context([sent, sent], []) == ("", "")


@pytest.mark.parametrize("state", ["a=" + "x" * 513, "é=1", "a", "=1", "a=b=c", "a=\x00", ",".join(["a=1"] * 33)])
def test_a_tracestate_that_is_invalid_is_not_passed_on(state: str) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert trace_context([parent], [state]) == (parent, "")
    assert trace_context([parent], [" a=1 , ,b@c=2 "]) == (parent, "a=1,b@c=2")
