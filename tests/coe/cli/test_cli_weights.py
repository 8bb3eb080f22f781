"""`coe ps | load | unload` against a running endpoint: output, JSON, errors and exit status."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from coe.cli.app import app
from coe.errors import ConfigError, RemoteError

WEIGHTS = {"version": 2, "requests": 1, "idle_s": 0.0, "ttl_s": None, "priority": 0, "size_bytes": 3 * 2**20}
A = {**WEIGHTS, "name": "org/a", "state": "resident", "unload_in_s": None, "pinned": True}
B = {**WEIGHTS, "name": "b", "state": "loading", "unload_in_s": 41.4, "pinned": False}

BROKEN = {**WEIGHTS, "name": "c", "state": "failing", "unload_in_s": None, "pinned": False, "reason": "c is damaged"}


class Endpoint(ThreadingHTTPServer):
    """Records requests, and answers all of them alike."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str | None]] = []
        self.answer: tuple[int, Any] = (200, {"hosts": []})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("authorization")))
        status, body = self.server.answer
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200", "KEY": "hunter22"})


def test_ps_lists_the_weights_of_each_host(endpoint: Endpoint) -> None:
    host = {"pool": "hosts", "used_bytes": 6 * 2**20, "budget_bytes": 2**30, "weights": [A, B, BROKEN]}
    endpoint.answer = 200, {"hosts": [host, {"pool": "hosts", "id": "x", "responds": False}]}
    shown = run("ps", "--url", f"{endpoint.url}/v1").stdout
    lines = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines[:2]] == [
        ["hosts 1", "org/a@2", "resident", "3", "1", "0", "pinned", "0"],
        ["hosts 1", "b@2", "loading", "3", "1", "0", "41", "0"],
    ]
    assert "hosts 1: c is damaged" in shown
    assert "6 of 1,024 MiB" in shown and "does not respond" in shown
    assert endpoint.asked == [("GET", "/admin/residency", None)]
    assert json.loads(run("ps", "--url", endpoint.url, "--json", "-").stdout)["hosts"][0] == host


def test_ps_lists_the_endpoints_of_remote_experts(endpoint: Endpoint) -> None:
    counts = {"in_flight": 2, "answered": 7, "failed": 5}
    state = {
        "expert": "big",
        "endpoint": 1,
        "url": "https://b.example/v1",
        "state": "open",
        "opens_in_s": 4.2,
        **counts,
    }
    endpoint.answer = 200, {"hosts": [{"pool": "hosts", "endpoints": [state]}]}
    shown = run("ps", "--url", endpoint.url).stdout
    [line] = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    cells = ["hosts 1", "big", "https://b.example/v1", "open", "4", "2", "7", "5"]
    assert [cell.strip() for cell in line] == cells


def test_load_and_unload_name_the_experts_in_the_query_and_send_the_key(endpoint: Endpoint) -> None:
    endpoint.answer = 200, {"hosts": [{"pool": "hosts", "loaded": ["base"]}]}
    done = run("load", "org/a", "b", "--url", endpoint.url, "--api-key-env", "KEY")
    assert done.exit_code == 0 and "hosts: loaded base" in done.stderr
    endpoint.answer = 200, {"hosts": [{"pool": "hosts", "unloaded": []}]}
    done = run("unload", "b", "--wait", "2", "--url", endpoint.url, "--json", "-")
    assert "nothing of it was in memory" in done.stderr and json.loads(done.stdout)["hosts"][0]["unloaded"] == []
    assert endpoint.asked == [
        ("POST", "/admin/load?expert=org%2Fa&expert=b", "Bearer hunter22"),
        ("POST", "/admin/unload?expert=b&wait_s=2", None),
    ]


def test_errors_are_the_words_of_the_service_or_say_what_is_wrong_with_the_url(endpoint: Endpoint) -> None:
    endpoint.answer = 404, {"error": {"message": "'bb' is not in the registry; did you mean 'b'?"}}
    assert_fails(RemoteError, "did you mean 'b'", "load", "bb", "--url", endpoint.url)
    for body in (b"<html>", [], {"error": 3}, {"hosts": 4}):
        endpoint.answer = 200, body
        assert_fails(RemoteError, "is it a service of `coe serve`", "ps", "--url", endpoint.url)
    assert_fails(ConfigError, "is not a URL like", "ps", "--url", "http://:8000")
    assert_fails(ConfigError, "is not a URL like", "ps", "--url", "http://127.0.0.1:99999")
    assert_fails(ConfigError, "is not a URL like", "ps", "--url", "127.0.0.1:8000")
    unset = run("ps", "--url", endpoint.url, "--api-key-env", "NO_SUCH_KEY")
    assert unset.exit_code == 2 and "NO_SUCH_KEY" in unset.stderr


@pytest.mark.parametrize("command", [("ps",), ("load", "a"), ("unload", "a")])
def test_a_wrong_address_fails_at_once_and_is_named_with_the_option_for_another(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe.engines.remote.client.fetch", None)  # not reached
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, so that no other process takes it; it does not listen
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert_fails(RemoteError, f"{url} cannot be reached (Connection refused): is the", *command, "--url", url)
        assert_fails(RemoteError, "--url names another address", *command, "--url", url)


def test_an_address_that_drops_connections_fails_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def silent(address: tuple[str, int], timeout: float) -> None:
        given.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert_fails(RemoteError, "(no connection within 2 s): is the service running there?", "ps", "--url", "http://a")
    assert given == [2.0]


def assert_fails(error: type[Exception], words: str, *arguments: str) -> None:
    """The error reaches `app.main`, which prints it and exits with status 1."""
    result = run(*arguments)
    assert isinstance(result.exception, error) and words in str(result.exception)
