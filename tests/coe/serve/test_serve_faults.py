"""kill -9 of every kind of process under load: which requests are answered, which are lost, and the time to recover.

`pytest -m slow -s tests/coe/serve/test_serve_faults.py` prints the times; most of each is a Python start-up.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_process import CONTROLLER, GATEWAYS, HAPROXY, HOSTS, PROXIES, ServeProcess, serving, starting, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXPERTS = """
experts:
  - {name: echo, kind: model, source: "fake://echo"}
  - {name: loud, kind: model, source: "fake://upper"}
"""
CONFIG = """
experts: [experts.yaml]
engines: {{fake: {{token_delay_s: 0.02, capacity: 64}}}}
host: {{budget: 1GiB}}
policies: {{default: {{expert: echo}}}}
serve:
  http: {path}
  gateway: {{replicas: {replicas}}}
  pools: [{{replicas: {replicas}}}]
  host_silent_s: 3
  log: {{folder: home/logs/decisions}}
"""
CLIENTS = 16
BACK_S = 60.0
"""Seconds in which everything must be as before, on a busy machine too."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one of each", "two of each"])
def replicas(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="module", params=["direct", "haproxy", "proxy"])
def path(request: pytest.FixtureRequest) -> str:
    """The setting `serve.http`."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def service(path: str, replicas: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(tmp_path_factory.mktemp("service"), CONFIG.format(path=path, replicas=replicas), EXPERTS) as service:
        yield service


@dataclass
class Load:
    """Clients that send requests without a pause; start, end and id of each request."""

    answered: list[tuple[float, float, str]] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)
    over: bool = False

    async def client(self, service: ServeProcess, name: str, retries: int) -> None:
        async with client_of(service, retries) as client:
            turn = 0
            while not self.over:
                turn += 1
                text = f"{name} says in turn {turn} that all is well with them"
                started = time.monotonic()
                try:
                    answer = await client.chat.completions.create(model="loud", messages=said(text))
                except openai.OpenAIError as error:
                    self.failed.append(error)
                    await asyncio.sleep(0.1)
                else:
                    assert answer.choices[0].message.content == text.upper(), "an answer to another request"
                    self.answered.append((started, time.monotonic(), answer.id))

    async def more(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        enough = len(self.answered) + len(self.failed) + count
        async with asyncio.timeout(BACK_S):
            while len(self.answered) + len(self.failed) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def after(self, moment: float) -> str:
        """A summary of the requests since then."""
        first_s = min(ended for started, ended, _ in self.answered if started > moment) - moment
        ends = sorted(ended for _, ended, _ in self.answered if ended > moment)
        silence_s = max(b - a for a, b in zip([moment, *ends], ends, strict=False))
        slowest_s = max(ended - started for started, ended, _ in self.answered)
        return (
            f"{len(self.answered)} answered, {len(self.failed)} failed; first answer to a new request after "
            f"{first_s:.1f} s, longest silence {silence_s:.1f} s, slowest answer {slowest_s:.1f} s"
        )


def client_of(service: ServeProcess, retries: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=retries, timeout=BACK_S)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def all_up(service: ServeProcess, replicas: int) -> float:
    """Wait until every gateway and every host answers; the seconds that took."""
    started = time.monotonic()
    while not await asyncio.to_thread(_all_answer, service, replicas):
        assert time.monotonic() - started < BACK_S, service.screen
        await asyncio.sleep(0.1)
    return time.monotonic() - started


@asynccontextmanager
async def load(service: ServeProcess, replicas: int, *, retries: int) -> AsyncIterator[Load]:
    """Clients that send requests while the block runs; all of them are answered in the end."""
    await all_up(service, replicas)
    under = Load()
    clients = [asyncio.create_task(under.client(service, f"client {i}", retries)) for i in range(CLIENTS)]
    await under.more(3 * CLIENTS)
    assert not under.failed
    yield under
    await under.more(3 * CLIENTS)
    under.over = True
    await asyncio.wait_for(asyncio.gather(*clients), BACK_S)
    assert service.process.poll() is None, service.screen


async def kill_under_load(
    service: ServeProcess, title: str, replicas: int, retries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill a process of a kind and wait until all are back: every request is answered. Prints the time."""
    async with load(service, replicas, retries=retries) as under:
        victim = service.parts(title)[0]
        os.kill(victim, signal.SIGKILL)
        moment = time.monotonic()
        await asyncio.to_thread(until, lambda: {victim}.isdisjoint(service.parts(title) or {victim}), BACK_S)
        await all_up(service, replicas)
        back_s = time.monotonic() - moment
    with capsys.disabled():
        print(f"\n{title}, 1 of {replicas}: {under.after(moment)}, all back after {back_s:.1f} s", flush=True)
    assert not under.failed


def _all_answer(service: ServeProcess, replicas: int) -> bool:
    try:
        hosts = len(service.hosts())
        with urllib.request.urlopen(f"{service.url}/metrics", timeout=5) as page:
            gateways = re.search(r"^coe_gateways ([\d.]+)", page.read().decode(), re.MULTILINE)
    except OSError:
        return False
    return hosts == replicas and gateways is not None and float(gateways[1]) == replicas


def logged(service: ServeProcess, pid: int) -> dict[str, dict[str, Any]]:
    """The entries of a gateway's decision log, by request id."""
    lines = [line for path in service.logs.glob(f"*-{pid}-*.jsonl") for line in path.read_text().splitlines()]
    return {entry["id"]: entry for entry in map(json.loads, lines)}


async def test_the_controller_dies_without_effect_on_requests(
    service: ServeProcess, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first test, because the others rely on the restarted controller."""
    await kill_under_load(service, CONTROLLER, replicas, 0, capsys)


async def test_a_host_dies_and_every_request_is_answered(
    service: ServeProcess, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without client retries: the gateway calls again, on another host or after the restart."""
    await kill_under_load(service, HOSTS, replicas, 0, capsys)


async def test_a_host_dies_and_streams_that_had_begun_end_with_an_error(service: ServeProcess, replicas: int) -> None:
    text = "word " * 300

    async def stream(client: openai.AsyncOpenAI, begun: asyncio.Barrier) -> tuple[str, str | None]:
        pieces: list[str] = []
        try:
            chunks = await client.chat.completions.create(model="loud", messages=said(text), stream=True)
            pieces.append((await anext(chunks)).choices[0].delta.content or "")
            await begun.wait()
            pieces += [chunk.choices[0].delta.content or "" async for chunk in chunks]
        except openai.APIError as error:
            return "".join(pieces), error.code
        return "".join(pieces), None

    await all_up(service, replicas)
    async with client_of(service, 0) as client, asyncio.timeout(BACK_S):
        begun = asyncio.Barrier(9)
        streams = [asyncio.create_task(stream(client, begun)) for _ in range(8)]
        await begun.wait()
        for victim in service.parts(HOSTS):
            os.kill(victim, signal.SIGKILL)
        moment = time.monotonic()
        ends = await asyncio.gather(*streams)
        assert time.monotonic() - moment < 5, "no wait for a lost answer"
        assert {code for _, code in ends} == {"host_lost"}
        assert all(text.upper().startswith(part) for part, _ in ends)
        answer = await client.chat.completions.create(model="loud", messages=said("again"))
        assert answer.choices[0].message.content == "AGAIN"


async def test_a_host_is_stopped_and_every_request_is_answered_by_the_other(
    service: ServeProcess, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped process keeps its connections open. Alone, its requests wait until it runs again."""
    async with load(service, replicas, retries=0) as under:
        victim = service.parts(HOSTS)[0]
        os.kill(victim, signal.SIGSTOP)
        moment = time.monotonic()
        if replicas > 1:
            await under.more(6 * CLIENTS)
            slowest_s = max(ended - started for started, ended, _ in under.answered if ended > moment)
            responds = [host.get("responds", True) for host in await asyncio.to_thread(service.hosts)]
            assert sorted(responds) == [False, True], "health names it, and the service is up"
        else:
            slowest_s = 5.0
            await asyncio.sleep(slowest_s)
        os.kill(victim, signal.SIGCONT)
        await all_up(service, replicas)
    with capsys.disabled():
        print(f"\na host stopped, 1 of {replicas}: slowest answer meanwhile {slowest_s:.1f} s", flush=True)
    assert not under.failed


async def test_a_gateway_dies_and_only_its_own_requests_need_the_clients_retries(
    service: ServeProcess, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The requests of a killed gateway are lost: the proxy returns 500, and the official client retries."""
    others = service.parts(GATEWAYS)[1:]
    before = [set(logged(service, other)) for other in others]
    await kill_under_load(service, GATEWAYS, replicas, 10, capsys)
    for other, known in zip(others, before, strict=True):
        entries = [entry for name, entry in logged(service, other).items() if name not in known]
        assert len(entries) > CLIENTS and {entry["error"] for entry in entries} == {None}, "untouched"


async def test_a_gateway_is_frozen_and_ray_serve_replaces_it(
    service: ServeProcess, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped process keeps its connections open, and with `direct` new ones still reach it."""
    async with load(service, replicas, retries=10) as under:
        victim = service.parts(GATEWAYS)[0]
        os.kill(victim, signal.SIGSTOP)
        moment = time.monotonic()
        await asyncio.to_thread(until, lambda: victim not in service.parts(GATEWAYS), BACK_S)
        replaced_s = time.monotonic() - moment
        await all_up(service, replicas)
    with capsys.disabled():
        print(
            f"\na gateway frozen, 1 of {replicas}: {under.after(moment)}, it is gone after {replaced_s:.1f} s",
            flush=True,
        )
    assert not under.failed


async def test_the_proxy_dies_and_every_request_is_answered_by_the_clients_retries(
    service: ServeProcess, path: str, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """All connections end in the proxy; each machine has one, and it restarts on the same port."""
    if path == "direct":
        assert not any(service.parts(title) for title in PROXIES.values()), "gateways listen themselves"
        return
    await kill_under_load(service, PROXIES[path], replicas, 10, capsys)


async def test_haproxy_itself_dies_and_is_started_again(
    service: ServeProcess, path: str, replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if path == "haproxy":
        await kill_under_load(service, HAPROXY, replicas, 10, capsys)
    assert bool(service.parts(HAPROXY)) == (path == "haproxy")


def test_the_command_itself_dies_and_takes_all_that_serves_with_it(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two agents of Ray, without a port or weights of the service, look for its head for a minute before they exit."""
    with starting(tmp_path, CONFIG.format(path=path, replicas=1), EXPERTS) as service:
        service.wait_for("Ctrl-C  stops")
        service.process.kill()
        parts = ("raylet", "gcs_server", *PROXIES.values(), HAPROXY, CONTROLLER, GATEWAYS, HOSTS)
        gone_s = until(lambda: not any(map(service.parts, parts)), 15, lambda: str(service.everything()))
    with capsys.disabled():
        print(f"\ncoe serve itself: all that serves is gone after {gone_s:.1f} s", flush=True)
