"""`coe chat --url` and `coe doctor` against servers that send too much, too long, too slowly, or something else."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from coe.cli.app import app
from coe.cli.chat import backends, stream
from coe.cli.doctor import service
from coe.cli.doctor.finding import Level
from coe.engines.remote.limits import MOST_LINE_BYTES, MOST_LIST_BYTES, MOST_STREAM_BYTES

MIB = 2**20
MODELS = [json.dumps({"data": [{"id": "gpt"}]}).encode()]
Pieces = Callable[[], Iterable[bytes]]


@contextmanager
def server(get: Pieces, post: Pieces = tuple, status: int = 200, **headers: str) -> Iterator[str]:
    """A server that sends what `get` and `post` yield as the bodies of answers, and closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(get)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(post)

        def _send(self, pieces: Pieces) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            with suppress(ConnectionError):
                for piece in pieces():
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def chat(url: str, *words: str, lines: str = "hello\n") -> Any:
    return CliRunner().invoke(app, ["chat", "--url", url, "-m", "gpt", *words], input=lines)


def event(text: str | None, reason: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'model': 'gpt', 'choices': [choice], **fields})}\n\n".encode()


def repeated(piece: bytes, most: int = 1024 * MIB) -> Pieces:
    def pieces() -> Iterator[bytes]:
        for _ in range(most // len(piece)):
            yield piece

    return pieces


def drip(piece: bytes = b" ") -> Iterator[bytes]:
    for _ in range(300):
        yield piece
        time.sleep(0.1)


def first(*pieces: bytes, then: Pieces = tuple) -> Pieces:
    def every() -> Iterator[bytes]:
        yield from pieces
        yield from then()

    return every


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (first(b"data: ", then=repeated(b"[" * MIB)), f"a line exceeds {MOST_LINE_BYTES:,} bytes"),
        (repeated(b": " + b"comment" * 10_000 + b"\n"), "bytes, more than max_tokens can need"),
        (first(b"data: " + b"[" * 100_000 + b"]" * 100_000 + b"\n\n"), "is not in the format of OpenAI"),
        (first(b"data: " + b"9" * 100_000 + b"\n\n"), "is not in the format of OpenAI"),
        (first(event("x", error={"message": "no\x1b[31m\n" * 10_000})), "no?[31m no?[31m"),
        (first(event(None, "content_filter")), "ended with finish_reason 'content_filter'"),
        (first(event("half")), "broke off the answer"),
    ],
)
def test_a_hostile_answer_is_one_line(pieces: Pieces, message: str) -> None:
    with server(lambda: MODELS, pieces) as url:
        result = chat(url, "--max-tokens", "64")
    assert message in result.stderr and result.stderr.count("error: ") == 1 and result.exit_code == 1
    assert "Traceback" not in result.output and max(map(len, result.stderr.splitlines())) < 1_000


def test_a_gigabyte_takes_the_memory_of_a_line() -> None:
    limits = stream.limits_of(None, 60.0)
    assert (limits.line_bytes, limits.stream_bytes) == (MOST_LINE_BYTES, MOST_STREAM_BYTES)
    chat("http://127.0.0.1:1")  # imports what a chat needs
    with server(lambda: MODELS, repeated(b"x" * MIB)) as url:
        tracemalloc.start()
        try:
            result = chat(url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert f"a line exceeds {MOST_LINE_BYTES:,} bytes" in result.stderr
    assert peak < 4 * MOST_LINE_BYTES


def test_an_empty_answer_is_one() -> None:
    with server(lambda: MODELS, first(event(None, "stop"), b"data: [DONE]\n\n")) as url:
        result = chat(url, lines="hello\n/why\n")
    assert result.exit_code == 0 and "gpt:" in result.stderr and "error" not in result.stderr


def test_an_endless_text_is_cut_as_if_by_max_tokens() -> None:
    with server(lambda: MODELS, repeated(event("word " * 1_000))) as url:
        result = chat(url, "--max-tokens", "64")
    assert result.exit_code == 0 and result.stdout.startswith("word word")
    assert len(result.stdout) < 64 * 128 + 2_000


def test_an_answer_without_end_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_S", 0.5)
    with server(lambda: MODELS, lambda: drip(event("tick "))) as url:
        started = time.monotonic()
        result = chat(url)
    assert "it takes more than 0.5 s" in result.stderr and result.stdout.startswith("tick tick")
    assert time.monotonic() - started < 20


def test_comments_do_not_keep_a_silent_answer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "ANSWER_S", 0.5)
    with server(lambda: MODELS, lambda: drip(b": still here\n\n")) as url:
        result = chat(url)
    assert "no event came within 0.5 s" in result.stderr


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (repeated(b" " * MIB), f"it has more than {MOST_LIST_BYTES // MIB} MiB"),
        (lambda: [b"[" * 100_000], "does not return a list of models"),
        (lambda: [b'{"data": [{"id": "gpt", "n": ' + b"9" * 100_000 + b"}]}"], "does not return a list of models"),
        (lambda: drip(), "did not answer in time"),
    ],
)
def test_a_hostile_list_of_models_is_one_error(monkeypatch: pytest.MonkeyPatch, pieces: Pieces, message: str) -> None:
    monkeypatch.setattr(backends, "LIST_S", 2.0)
    with server(pieces) as url:
        error = chat(url).exception
    assert message in str(error)


def test_names_that_a_terminal_would_act_on_are_not_listed() -> None:
    names = ["gpt", "\x1b[2Jbad", "x" * 257, "", 7, "y" * 256]
    with server(lambda: [json.dumps({"data": [{"id": name} for name in names]}).encode()]) as url:
        listed = chat(url, lines="/model\n").stderr
    assert "* gpt" in listed and "\x1b" not in listed and "bad" not in listed
    assert "y" * 256 in listed and "x" * 257 not in listed


def test_a_redirect_is_not_followed_and_a_compressed_answer_not_unpacked() -> None:
    with server(lambda: MODELS) as other:
        with server(tuple, status=307, location=f"{other}/v1/models") as url:
            assert "a redirect, which is not followed" in str(chat(url).exception)
        with server(lambda: MODELS, content_encoding="gzip") as url:
            assert "it is compressed ('gzip')" in str(chat(url).exception)


@pytest.mark.parametrize(
    "explanation",
    [
        {"decision": {"confidence": "high"}, "policy": "p"},
        {"decision": 7, "policy": "p"},
        {"notes": 7, "policy": None, "decision": {}},
        {"estimate": {"a": 1, "b": 2}},
        {"estimate": "ab"},
        {"asked": [{}, []]},
    ],
)
def test_an_explanation_of_another_shape_is_not_shown(explanation: dict[str, Any]) -> None:
    answer = first(event("fine", "stop", coe=explanation), b"data: [DONE]\n\n")
    with server(lambda: MODELS, answer) as url:
        result = chat(url, lines="hello\n/why\n")
    assert result.exit_code == 0 and "the explanation of the endpoint cannot be read" in result.stderr


def levels(url: str) -> list[Level]:
    return [one.level for one in service.port("127.0.0.1", int(url.rpartition(":")[2]))]


def test_the_doctor_leaves_whatever_listens_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HEALTH_S", 0.5)
    for pieces in (drip, repeated(b" " * MIB), lambda: [b"[" * 100_000], lambda: [b"[]"]):
        with server(pieces) as url:
            started = time.monotonic()
            assert levels(url) == [Level.BROKEN]
            assert time.monotonic() - started < 20
    with (
        server(lambda: [b"{}"]) as other,
        server(tuple, status=302, location=f"{other}/health") as url,
    ):
        assert levels(url) == [Level.BROKEN]


def test_the_doctor_shows_what_a_service_states_on_lines() -> None:
    state = {"warnings": ["a\x1b[2J\nb"] * 1_000, "hosts": [7, {"id": {}, "responds": False}], "problem": "x" * 10_000}
    with server(lambda: [json.dumps(state).encode()]) as url:
        found = list(service.port("127.0.0.1", int(url.rpartition(":")[2])))
    assert len(found) == 1 + 1 + 100 + 1
    assert all(len(one.text) <= 600 and one.text.isprintable() for one in found)
