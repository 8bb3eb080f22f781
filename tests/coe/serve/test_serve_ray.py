"""The whole service on Ray, through the official client: one start for all these tests, for each way of HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import openai
import psutil  # type: ignore[import-untyped]
import pytest
from serve_process import GATEWAYS, HOSTS, ServeProcess, starting, until
from typer.testing import CliRunner

from coe.cli.app import app
from coe.engines.fake_answers import vectors_of
from routers.artifacts import save
from routers.kinds.baselines import RandomRouter
from routers.outcomes.table import OutcomeTable

pytestmark = [pytest.mark.integration]

EXPERTS = """
experts:
  - {name: echo, kind: model, source: "fake://echo", size_bytes: 1000000000, context_length: 1000}
  - {name: upper, kind: model, source: "fake://upper", size_bytes: 1000000000, context_length: 1000}
  - {name: base, kind: model, source: "fake://echo", size_bytes: 1000000000, context_length: 1000}
  - {name: loud, kind: adapter, base: base, source: "fake://upper", size_bytes: 1000000}
  - {name: calm, kind: adapter, base: base, source: "fake://echo", size_bytes: 1000000}
  - {name: capital, kind: model, source: "fake://script?france=Paris&italy=Rome&default=No", size_bytes: 1000000000}
  - {name: alone, kind: model, source: "fake://echo", size_bytes: 1000000000}
  - {name: vectors, kind: embedding, source: "fake://echo", size_bytes: 1000000}
"""
CONFIG = """
experts: [experts.yaml]
engines: {{fake: {{token_delay_s: 0.01, load_delay_s: 0.3}}}}
policies:
  default: {{router: router}}
  named: {{expert: {named}}}
serve:
  http: {path}
  watch_s: 0.2
  max_body_bytes: 100KB
  body_idle_s: 1
  gateway: {{replicas: 2}}
  pools:
    - {{name: hosts, replicas: 2, budget: 4GB}}
    - {{name: aside, experts: [{aside}], budget: 2GB}}
  log: {{folder: home/logs/decisions, texts: true}}
"""
CLIENTS = 16
ROUNDS = 12


def save_router(folder: Path) -> None:
    """A random router between two experts: the same query always gets the same one."""
    table = OutcomeTable(("a", "b"), ("a", "b"), ("echo", "upper"), np.array([[1.0, 0.0], [0.0, 1.0]]))
    save(RandomRouter(seed=1).fit(table), folder, table=table, encoder=None)


@pytest.fixture(
    scope="module",
    params=["direct", *(pytest.param(path, marks=pytest.mark.slow) for path in ("haproxy", "proxy"))],
)
def path(request: pytest.FixtureRequest) -> str:
    """The setting `serve.http`: the default, and the others with `-m slow`."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def service(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("service")
    save_router(folder / "router")
    with starting(folder, CONFIG.format(named="upper", path=path, aside="capital, echo"), EXPERTS) as service:
        service.wait_for("Ctrl-C  stops")
        yield service


@pytest.fixture
async def client(service: ServeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=0) as client:
        yield client


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def ask(client: openai.AsyncOpenAI, model: str, text: str) -> str:
    answer = await client.chat.completions.create(model=model, messages=said(text))
    return answer.choices[0].message.content or ""


async def streamed(client: openai.AsyncOpenAI, model: str, text: str) -> list[str]:
    stream = await client.chat.completions.create(model=model, messages=said(text), stream=True)
    return [chunk.choices[0].delta.content or "" async for chunk in stream]


def right_answer(model: str, text: str) -> str:
    """The answer that each expert of these tests must give."""
    capitals = {"france": "Paris", "italy": "Rome"}
    known = {
        "echo": text,
        "upper": text.upper(),
        "base": text,
        "loud": f"[loud] {text.upper()}",
        "calm": f"[calm] {text}",
        "capital": next((city for land, city in capitals.items() if land in text.lower()), "No"),
    }
    return known[model]


def test_it_answers_as_soon_as_it_says_so(service: ServeProcess) -> None:
    """The first test: no request was sent before."""
    health = service.health()
    assert health["status"] == "ok" and health["experts"] == 8 and health["policies"] == ["default", "named"]
    assert sorted(host["pool"] for host in health["hosts"]) == ["aside", "hosts", "hosts"]
    for words in ("ray  up in", "logs in", "hosts  2 up in", "aside  1 up in", "gateway  2 up in", service.base_url):
        assert words in service.screen


def test_what_answers_has_the_priority_of_the_command(service: ServeProcess) -> None:
    processes = [*service.parts(GATEWAYS), *service.parts(HOSTS)]
    assert len(processes) == 4
    assert {psutil.Process(pid).nice() for pid in processes} == {psutil.Process(service.process.pid).nice()}


async def test_a_stream_has_the_same_text_as_a_whole_answer_and_comes_while_it_is_made(
    client: openai.AsyncOpenAI,
) -> None:
    text = "one two three " * 20
    whole = await client.chat.completions.create(model="upper", messages=said(text))
    started, seen = time.perf_counter(), []
    stream = await client.chat.completions.create(
        model="upper", messages=said(text), stream=True, stream_options={"include_usage": True}
    )
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        seen.append(time.perf_counter() - started)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text.upper()
    assert whole.choices[0].message.content == text.upper()
    assert chunks[-1].usage == whole.usage and whole.usage is not None and whole.usage.completion_tokens == 60
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert len(chunks) > 8 and seen[-1] - seen[0] > 0.3, "60 tokens of 10 ms are not held back to the end"


async def test_concurrent_clients_of_mixed_experts_each_get_their_own_answers(service: ServeProcess) -> None:
    """Each with its own connection, as 16 programs would have."""
    models = ("echo", "upper", "base", "loud", "calm", "capital")

    async def one(i: int) -> None:
        async with openai.AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=0) as client:
            for turn in range(ROUNDS):
                model = models[(i + turn) % len(models)]
                text = f"client {i} turn {turn} asks of {('France', 'Italy', 'Peru')[(i + turn) % 3]}"
                if (i + turn) % 4:
                    assert await ask(client, model, text) == right_answer(model, text)
                else:
                    assert "".join(await streamed(client, model, text)) == right_answer(model, text)

    await asyncio.gather(*(one(i) for i in range(CLIENTS)))
    writers = {path.name.split("-")[-2] for path in service.logs.glob("*.jsonl")}
    assert writers == {str(pid) for pid in service.parts(GATEWAYS)}, "both gateways took a part of it"


async def test_requests_of_an_expert_gather_on_the_host_that_has_it(
    service: ServeProcess, client: openai.AsyncOpenAI
) -> None:
    await ask(client, "alone", "hello")
    await asyncio.sleep(1.5)  # every gateway knows where it is
    texts = [f"hello {i}" for i in range(30)]
    assert await asyncio.gather(*(ask(client, "alone", text) for text in texts)) == texts
    assert sorted(host["loads"].get("alone", 0) for host in service.hosts()) == [0, 0, 1]


async def test_auto_a_policy_and_an_expert_by_name(client: openai.AsyncOpenAI) -> None:
    async def answered(model: str, text: str) -> tuple[str, str]:
        raw = await client.chat.completions.with_raw_response.create(model=model, messages=said(text))
        answer = raw.parse()
        assert answer.model == raw.headers["x-coe-expert"]
        assert answer.choices[0].message.content == right_answer(answer.model, text)
        return answer.model, raw.headers["x-coe-router"]

    drawn = await asyncio.gather(*(answered("auto", f"question {i}") for i in range(12)))
    assert {policy for _, policy in drawn} == {"default"}
    assert {expert for expert, _ in drawn} == {"echo", "upper"}
    assert await answered("coe/named", "hello") == ("upper", "named")
    assert await answered("loud", "hello") == ("loud", "direct")
    listed = [model.id async for model in client.models.list()]
    assert listed[:3] == ["auto", "coe/default", "coe/named"] and "capital" in listed


async def test_vectors_of_texts(service: ServeProcess, client: openai.AsyncOpenAI) -> None:
    texts = [f"text {i}" for i in range(50)]
    answers = await asyncio.gather(*(client.embeddings.create(model="vectors", input=texts) for _ in range(8)))
    for answer in answers:
        assert np.array_equal(np.array([one.embedding for one in answer.data], np.float32), vectors_of(texts))
        assert answer.usage.prompt_tokens == 100 and answer.model == "vectors"
    assert any("vectors" in host["resident"] for host in await asyncio.to_thread(service.hosts))
    with pytest.raises(openai.BadRequestError, match="'echo' returns no embeddings: name one of vectors"):
        await client.embeddings.create(model="echo", input="a")
    with pytest.raises(openai.BadRequestError, match="cannot chat; send texts to /v1/embeddings"):
        await ask(client, "vectors", "hello")


async def test_route_decides_as_the_answer_does(client: openai.AsyncOpenAI) -> None:
    for i in range(6):
        body: dict[str, Any] = {"model": "auto", "messages": said(f"whose is question {i}?"), "coe": {"seed": i}}
        routed = await client.post("/route", body=body, cast_to=dict[str, Any])
        answered = await client.chat.completions.create(
            model="auto",
            messages=body["messages"],
            extra_body={"coe": body["coe"]},
            extra_headers={"x-coe-debug": "true"},
        )
        told = (answered.model_extra or {})["coe"]
        assert routed["decision"] == told["decision"] and routed["estimate"] == told["estimate"]
        assert answered.model == routed["decision"]["experts"][0]


async def test_mistakes_are_told_in_openais_shape(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'uper' is not .*did you mean 'upper'\?"):
        await ask(client, "uper", "hello")
    with pytest.raises(openai.BadRequestError, match=r"max_tokenz: is not a known field; did you mean 'max_tokens'"):
        await client.chat.completions.create(model="echo", messages=said("hello"), extra_body={"max_tokenz": 3})
    with pytest.raises(openai.BadRequestError) as long:
        await ask(client, "echo", "word " * 1500)
    assert long.value.code == "context_length_exceeded"
    assert "1500" in long.value.message and "1000" in long.value.message
    with pytest.raises(openai.APIStatusError) as large:
        await ask(client, "echo", "word " * 30_000)
    assert large.value.status_code == 413 and "100,000 bytes" in large.value.message
    with pytest.raises(openai.NotFoundError, match="no such endpoint"):
        await client.post("/nowhere", body={}, cast_to=dict[str, Any])


async def test_a_client_that_leaves_stops_the_expert_on_its_host(
    service: ServeProcess, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(model="echo", messages=said("a " * 900), stream=True)
    await anext(stream)
    assert sum(host["busy"] for host in await asyncio.to_thread(service.hosts)) == 1
    await stream.close()
    whole = asyncio.ensure_future(ask(client, "upper", "a " * 900))
    await asyncio.to_thread(until, lambda: any(host["busy"] for host in service.hosts()), 2)
    whole.cancel()
    await asyncio.to_thread(until, lambda: not any(host["busy"] for host in service.hosts()), 2)


async def test_experts_are_loaded_and_unloaded_on_every_host_that_serves_them(
    service: ServeProcess, client: openai.AsyncOpenAI, path: str
) -> None:
    async def run(*arguments: str) -> Any:
        command = [*arguments, "--url", service.base_url, "--json", "-"]
        return await asyncio.to_thread(CliRunner().invoke, app, command)  # it has an event loop of its own

    if path == "haproxy":  # every connection comes from it
        refused = await run("load", "capital")
        assert refused.exit_code == 1 and "serve.admin_key_env" in str(refused.exception)
        return
    loaded = await run("load", "capital")
    assert loaded.exit_code == 0, loaded.output
    assert sorted((host["pool"], *host["loaded"]) for host in json.loads(loaded.stdout)["hosts"]) == [
        ("aside", "capital"),
        ("hosts", "capital"),
        ("hosts", "capital"),
    ]
    for _ in range(100):  # hosts report twice a second
        now = (await client.models.retrieve("capital")).coe["residence"]  # type: ignore[attr-defined]
        if now["hosts"]["resident"] == 3:
            break
        await asyncio.sleep(0.2)
    assert (now["state"], now["size_bytes"], now["hosts"]["resident"]) == ("resident", 10**9, 3)
    unloaded = await run("unload", "capital")
    assert [host["unloaded"] for host in json.loads(unloaded.stdout)["hosts"]] == [["capital"]] * 3
    in_memory = json.loads((await run("ps")).stdout)["hosts"]
    assert len(in_memory) == 3 and "capital" not in str(in_memory)


async def test_metrics_count_what_both_gateways_answered(client: openai.AsyncOpenAI) -> None:
    async def counted() -> Counter[str]:
        page = await client.get("http://" + str(client.base_url.netloc, "ascii") + "/metrics", cast_to=str)
        total: Counter[str] = Counter()
        for line in page.splitlines():
            if line.startswith("coe_requests_total{") and 'expert="calm"' in line:
                total["calm"] += int(float(line.rpartition(" ")[2]))
                total[line.partition('gateway="')[2].partition('"')[0]] += 1
        return total

    before = await counted()
    await asyncio.gather(*(ask(client, "calm", f"hello {i}") for i in range(10)))
    after = await counted()
    assert after["calm"] - before["calm"] == 10


async def test_every_logged_decision_replays_identically(service: ServeProcess, client: openai.AsyncOpenAI) -> None:
    await asyncio.gather(*(ask(client, "auto", f"for the log {i}") for i in range(8)))
    lines = [line for path in service.logs.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) > 8 + 12
    config = str(service.folder / "service.yaml")
    done = CliRunner().invoke(app, ["replay", str(service.logs), "--config", config, "--json", "-"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["differing"] == 0 and report["repeated"] >= 8 + 12
    rerouted = report["rerouted"]["policies"]["default"]
    assert rerouted["routed"] == rerouted["same_choice"] == rerouted["same_router"] > 0


def change(path: Path, text: str) -> None:
    """Write at once, as an editor does."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


async def test_changes_are_served_without_a_restart_and_disturb_no_request(
    service: ServeProcess, client: openai.AsyncOpenAI, path: str
) -> None:
    """The last of these tests but one: it changes the service."""
    pids = (service.parts(GATEWAYS), service.parts(HOSTS))
    text = "a " * 400
    running = [asyncio.create_task(streamed(client, "upper", text)) for _ in range(4)]
    await asyncio.sleep(0.3)

    change(service.folder / "experts.yaml", EXPERTS + '  - {name: newcomer, kind: model, source: "fake://upper"}\n')
    await asyncio.to_thread(service.wait_for, "reloaded  added newcomer", 1, 15)
    assert await ask(client, "newcomer", "hello") == "HELLO"
    assert not any(stream.done() for stream in running), "they run on through the change"
    change(service.folder / "service.yaml", CONFIG.format(named="echo", path=path, aside="alone, echo"))
    await asyncio.to_thread(service.wait_for, "reloaded  same experts", 1, 15)
    assert "other experts in the pools aside" in service.screen
    assert await ask(client, "coe/named", "hello") == "hello"
    if path != "haproxy":  # admin calls need a key there
        command = ["load", "alone", "--url", service.base_url, "--json", "-"]
        loaded = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert sorted(host["pool"] for host in json.loads(loaded.stdout)["hosts"]) == ["aside", "hosts", "hosts"]

    change(service.folder / "service.yaml", CONFIG.format(named="ecoh", path=path, aside="alone, echo"))
    await asyncio.to_thread(service.wait_for, "not reloaded", 1, 15)
    assert "did you mean 'echo'" in service.screen and "The service continues unchanged." in service.screen
    assert await ask(client, "coe/named", "hello") == "hello"

    assert ["".join(chunks) for chunks in await asyncio.gather(*running)] == [text.upper()] * 4
    assert (service.parts(GATEWAYS), service.parts(HOSTS)) == pids


async def test_gateways_call_their_hosts_over_links(service: ServeProcess, client: openai.AsyncOpenAI) -> None:
    """Not through Serve's handle, which takes the calls as well if links do not work."""
    await asyncio.gather(*(ask(client, "echo", f"word {i}") for i in range(20)))
    links = service.links()
    assert max(links.values()) >= 1, links


def test_nothing_answers_beyond_loopback(service: ServeProcess, path: str) -> None:
    """Ray's own processes listen on all interfaces; none of them may speak HTTP for the service."""
    listening = service.listening()
    assert {address for address, port in listening if port == service.port} == {"127.0.0.1"}
    own = socket.gethostbyname(socket.gethostname())
    beyond = {port for address, port in listening if not address.startswith("127.")}
    assert beyond, "Ray listens"
    for port in beyond:
        with suppress(OSError, HTTPException), urlopen(f"http://{own}:{port}/v1/models", timeout=3) as answer:
            assert b'"auto"' not in answer.read(), f"{path}: port {port} of all interfaces"


async def test_headers_without_end_are_refused(service: ServeProcess, path: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
    answer = asyncio.create_task(reader.readline())
    for _ in range(200):
        writer.write(b"x-pad: " + b"x" * 4000 + b"\r\n")
        await asyncio.sleep(0.005)
        if answer.done():
            break
    status = 400 if path == "haproxy" else 431
    assert (await asyncio.wait_for(answer, 10)).startswith(f"HTTP/1.1 {status}".encode())
    writer.close()


async def test_a_slow_body_and_a_page_of_another_site_are_refused(service: ServeProcess) -> None:
    async with openai.DefaultAsyncHttpxClient(base_url=service.url) as http:
        body = {"model": "echo", "prompt": "hi"}
        for headers, status in (({"host": "evil.example"}, 403), ({"origin": "https://evil.example"}, 403), ({}, 200)):
            assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == status
        assert (await http.post("/v1/completions", content=json.dumps(body))).status_code == 415
        answer = await http.post("/v1/completions", json=body, headers={"x-request-id": "of-the-client"})
        assert answer.headers["x-request-id"] == "of-the-client"
        assert (await http.get("/v1/models")).headers["x-request-id"]
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
    writer.write(b"content-length: 1000\r\n\r\n{")
    assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 408")
    writer.close()


def test_ctrl_c_ends_a_service_that_is_answering(service: ServeProcess) -> None:
    """The last of these tests. With streams running; sent to the process group, and a second time."""
    body = {"model": "alone", "prompt": "word " * 6000, "stream": True}
    url, headers = f"{service.base_url}/completions", {"content-type": "application/json"}
    request = Request(url, json.dumps(body).encode(), headers)
    streams = [urlopen(request, timeout=30) for _ in range(4)]
    assert all(stream.readline().startswith(b"data: ") for stream in streams)
    service.ctrl_c()
    time.sleep(0.5)
    service.ctrl_c()
    assert service.ended() == 0
    assert service.screen.rstrip().endswith("stopped") and "Traceback" not in service.screen
    for stream in streams:
        with suppress(IncompleteRead, ConnectionError), stream:
            assert b"[DONE]" not in stream.read(), "a minute of text cannot be over"
