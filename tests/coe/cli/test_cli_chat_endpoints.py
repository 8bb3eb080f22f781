"""`coe chat --url` and endpoints that are no OpenAI-compatible service: one clear line each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from coe.cli.app import app

JSON, HTML, EVENTS = "application/json", "text/html", "text/event-stream"
MODELS = (JSON, json.dumps({"object": "list", "data": [{"id": "gpt", "object": "model"}]}))


class Quiet(BaseHTTPRequestHandler):
    """Answers GET with `models` and POST with `answers`, the last one again and again."""

    models: tuple[str, str] | None
    answers: list[tuple[str, str]]
    released: threading.Event

    def do_GET(self) -> None:
        if self.models is None:
            self.released.wait(30)
            return
        self._send(*self.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(*(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]))

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


Endpoint = Callable[..., str]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """Starts a server with a list of models and answers; returns its URL."""
    servers: list[ThreadingHTTPServer] = []
    released = threading.Event()

    def start(models: tuple[str, str] | None, *answers: tuple[str, str]) -> str:
        handler = type("Handler", (Quiet,), {"models": models, "answers": list(answers), "released": released})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(url: str, *words: str, lines: str = "hello\n") -> Any:
    return CliRunner().invoke(app, ["chat", "--url", url, *words], input=lines)


def chunk(text: str) -> str:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "gpt", "choices": [delta]}
    return f"data: {json.dumps(body)}\n\n"


@pytest.mark.parametrize("models", [(HTML, "<html>hi</html>"), (JSON, "{broken"), (JSON, '{"a": 1}'), (JSON, "[3]")])
def test_what_is_no_list_of_models_is_one_error(endpoint: Endpoint, models: tuple[str, str]) -> None:
    error = chat(endpoint(models), "-m", "gpt").exception
    assert "/v1/models does not return a list of models" in str(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((EVENTS, ""), "ended the answer without a chunk"),
        ((JSON, '{"id": "1", "choices": []}'), "ended the answer without a chunk"),
        ((HTML, "<html>hi</html>"), "ended the answer without a chunk"),
        ((EVENTS, "data: {broken\n\n"), "sends a stream that is not in the format of OpenAI"),
        ((EVENTS, "data: 3\n\n"), "sends a stream that is not in the format of OpenAI"),
    ],
)
def test_the_conversation_goes_on_after_a_damaged_answer(
    endpoint: Endpoint, answer: tuple[str, str], message: str
) -> None:
    good = (EVENTS, chunk("fine") + "data: [DONE]\n\n")
    done = chat(endpoint(MODELS, answer, good), "-m", "gpt", lines="one\ntwo\n")
    assert done.stderr.count("error: ") == 1 and message in done.stderr
    assert done.stdout == "fine\n" and done.exit_code == 1 and isinstance(done.exception, SystemExit)


def test_an_endpoint_without_auto_asks_for_a_model(endpoint: Endpoint) -> None:
    error = str(chat(endpoint(MODELS)).exception)
    assert "'auto' is not among the models of the endpoint" in error and "--model NAME; it has gpt" in error


@pytest.mark.parametrize("url", ["http://host:port", "http://[::1", "http://a b\x00/"])
def test_an_invalid_url_is_one_error(url: str) -> None:
    assert "is not a URL like http://" in str(chat(url).exception)


def test_an_endpoint_that_never_answers_is_given_up(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.cli.chat.backends.LIST_S", 0.2)
    error = str(chat(endpoint(None)).exception)
    assert "did not answer in time (connection 10 s, answer 0.2 s)" in error
