"""Loads that fail in a running service: a host that is killed in the middle of one, and an expert that never loads."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serve_process import HOSTS, ServeProcess, serving, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXPERTS = """
experts:
  - {name: echo, kind: model, source: "fake://echo"}
  - {name: loud, kind: model, source: "fake://upper"}
  - {name: broken, kind: model, source: "fake://fail?at=load"}
"""
CONFIG = """
experts: [experts.yaml]
engines: {fake: {load_delay_s: 3}}
host: {budget: 1GiB}
policies: {default: {expert: echo}}
serve: {http: direct, log: {folder: home/logs/decisions}}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(tmp_path_factory.mktemp("service"), CONFIG, EXPERTS) as service:
        yield service


def ask(service: ServeProcess, model: str, text: str) -> tuple[int, Any]:
    """Status and body of a chat request."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{service.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def said(service: ServeProcess, model: str, text: str) -> str:
    status, body = ask(service, model, text)
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def weights(service: ServeProcess) -> dict[str, dict[str, Any]]:
    """What `coe ps` lists of the one host, by name."""
    with urllib.request.urlopen(f"{service.url}/admin/residency", timeout=30) as answer:
        return {each["name"]: each for host in json.load(answer)["hosts"] for each in host.get("weights", [])}


def test_a_host_that_is_killed_while_it_loads_is_replaced_and_the_request_is_answered(service: ServeProcess) -> None:
    [host] = service.parts(HOSTS)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(said, service, "loud", "who is there")
        until(lambda: weights(service).get("loud", {}).get("state") == "loading", 30)
        os.kill(host, signal.SIGKILL)
        killed = time.monotonic()
        assert answer.result(120) == "WHO IS THERE"
    print(f"answered {time.monotonic() - killed:.1f} s after the kill")
    assert host not in service.parts(HOSTS)
    assert weights(service)["loud"]["state"] == "resident"


def test_an_expert_that_never_loads_is_left_alone_for_a_while_and_listed_with_its_reason(service: ServeProcess) -> None:
    assert said(service, "echo", "hello there") == "hello there"
    for _ in range(3):
        status, body = ask(service, "broken", "hello")
        assert status == 500 and body["error"]["code"] == "invalid_weights"
    started = time.monotonic()
    status, body = ask(service, "broken", "hello")
    assert status == 503 and body["error"]["code"] == "load_failing" and time.monotonic() - started < 3
    listed = weights(service)["broken"]
    assert listed["state"] == "failing" and "as its source" in listed["reason"]
    [host] = service.hosts()
    assert "3 loads in a row" in host["unhealthy"]["broken"] and not any(each["reason"] for each in host["weights"])
    assert said(service, "echo", "and now") == "and now"
