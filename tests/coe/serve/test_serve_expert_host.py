"""An expert host outside Ray: its messages, its status, and catalogs that change while it runs."""

import asyncio
import logging
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from virtual_time import in_virtual_time

from coe.chunks import merged
from coe.config import Config, HostPoolConfig, PolicyConfig
from coe.errors import BudgetExceeded, ConfigError, ContextLengthExceeded, EngineError, NotServedHere, UnknownModel
from coe.host import Host
from coe.serve.cluster.catalog import Catalog, called_in, serving
from coe.serve.cluster.expert_host import (
    LINK_CHUNKS_PER_S,
    LINK_SLOWEST_S,
    ExpertHost,
    coalesce,
    own_config,
    pace,
)
from coe.serve.cluster.link import Link
from coe.serve.cluster.observing import log_to_serve
from coe.serve.cluster.placement import HostStatus
from coe.serve.cluster.scaling import IN_FLIGHT
from coe.types import Chunk, GenerateRequest, Timing, TokenLogprob, ToolCallDelta, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

POOL = HostPoolConfig()


def model(name: str, source: str = "fake://upper", **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source=source, size_bytes=2**20, **fields)


def snapshot(*specs: ExpertSpec, version: int = 1) -> Snapshot:
    return Snapshot(version, {spec.name: spec for spec in specs})


def catalog(*specs: ExpertSpec, generation: int = 1) -> dict[str, Any]:
    return Catalog(generation, snapshot(*specs, version=generation), {}, "default").to_json()


async def started(*specs: ExpertSpec, pool: HostPoolConfig = POOL, **host: Any) -> ExpertHost:
    config = Config.model_validate({"host": {"budget": 3 * 2**20, **host}})
    expert_host = ExpertHost(config, pool)
    assert await expert_host.record_routing_stats() == {}  # called by Serve before the first catalog
    await expert_host.reconfigure(catalog(*specs))
    expert_host.check_health()
    return expert_host


def request(text: str = "one two three", **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **fields)


async def pieces(host: ExpertHost, expert: str, wanted: GenerateRequest, generation: int = 1) -> list[Any]:
    return [piece async for piece in host.stream(expert, wanted, generation)]


async def test_an_answer_streamed_and_whole_is_the_same_text_with_the_host_s_own_timing() -> None:
    host = await started(model("up"))
    *texts, last = await pieces(host, "up", request())
    assert "".join(chunk.text for chunk in (*texts, last)) == "ONE TWO THREE"
    assert last.finish_reason == "stop" and last.timing.engine_s > 0 and last.timing.load_s >= 0
    whole = await host.whole("up", request(), 1)
    assert isinstance(whole, Chunk) and (whole.text, whole.usage) == ("ONE TWO THREE", Usage(3, 3))


async def test_a_whole_answer_has_every_piece_of_the_streamed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    usage, timing = Usage(2, 3), Timing(0.1, 0.2, 0.3)
    first = Chunk("a b", reasoning="hm ", prompt_logprobs=(TokenLogprob("a", None), TokenLogprob(" b", -1.0)))
    second = Chunk(" c", reasoning="yes", logprobs=(TokenLogprob(" c", -0.5, b" c", ((" c", -0.5, b" c"),)),))
    call = Chunk("", tool_calls=(ToolCallDelta(0, "1", "f", "{"),), logprobs=(TokenLogprob("!", -2.0),))
    end = ToolCallDelta(0, arguments="}")
    last = Chunk("", "tool_calls", usage, timing, value=b"x", tool_calls=(end,), notes=("b was left out",))

    async def ask(self: Host, expert: str, wanted: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        for chunk in (first, second, call, last):
            yield chunk

    host = await started(model("up"))
    monkeypatch.setattr(Host, "ask", ask)
    streamed = Chunk("")
    for piece in await pieces(host, "up", request()):
        streamed = merged(streamed, piece)
    whole = await host.whole("up", request(), 1)
    assert whole == replace(streamed, tool_calls=(ToolCallDelta(0, "1", "f", "{}"),))
    assert whole.notes == ("b was left out",)
    assert (whole.text, whole.reasoning, len(whole.prompt_logprobs), len(whole.logprobs)) == ("a b c", "hm yes", 2, 2)


async def test_errors_are_sent_as_values_and_survive_the_way_between_processes() -> None:
    host = await started(model("short", context_length=4), model("bad", "fake://fail?after=1"))
    too_long = await host.whole("short", request(max_tokens=9), 1)
    assert isinstance(too_long, ContextLengthExceeded)
    copy = pickle.loads(pickle.dumps(too_long))
    assert (type(copy), str(copy), copy.max_tokens) == (ContextLengthExceeded, str(too_long), 9)
    first, error = await pieces(host, "bad", request())
    assert first.text == "one" and isinstance(error, EngineError)
    assert isinstance(await host.whole("nobody", request(), 1), UnknownModel)


async def test_a_host_tells_where_an_expert_would_start_and_what_it_holds() -> None:
    host = await started(
        model("a"), model("b"), ExpertSpec(name="x", kind=Kind.ADAPTER, base="b", source="fake://echo")
    )
    assert (await host.record_routing_stats())["load_s"]["a"] > 0
    await host.whole("x", request(), 1)
    told = await host.record_routing_stats()
    assert told["load_s"].keys() == {"a", "b"} and told["load_s"]["b"] == 0 < told["load_s"]["a"]
    assert (told["tight"], told["busy"], told["queue_s"]) == ([], 0, {})
    state = await host.state()
    assert (state["resident"], state["loads"], state["generation"]) == (["b"], {"b": 1}, 1)
    assert state["used_bytes"] == 2**20 and state["budget_bytes"] == 3 * 2**20


async def test_an_expert_that_does_not_answer_is_reported_and_the_host_stays_healthy() -> None:
    host = await started(model("a"), model("b"))
    for name in "ab":
        await host.whole(name, request(), 1)
    assert (await host.state())["unhealthy"] == {} and (await host.record_routing_stats())["load_s"] == {"a": 0, "b": 0}
    expert: Any = host._started().cache.peek("a")
    expert.unhealthy = lambda: "its engine process died and starts again"
    assert (await host.state())["unhealthy"] == {"a": "its engine process died and starts again"}
    reported = (await host.record_routing_stats())["load_s"]
    assert reported["a"] > 0 == reported["b"]  # gateways prefer another host for it
    host.check_health()
    assert isinstance(await host.whole("b", request(), 1), Chunk)

    def broken() -> str:
        raise RuntimeError("no state")

    expert.unhealthy = broken
    assert "no state" in (await host.state())["unhealthy"]["a"]


def test_the_log_of_a_host_has_the_progress_of_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    engines = logging.getLogger("coe")
    monkeypatch.setattr(engines, "handlers", [])
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [handler])
    before = engines.level
    try:
        for _ in range(2):
            log_to_serve(("coe",))
        logging.getLogger("coe.engines.vllm.process").info("vLLM is starting")
    finally:
        engines.setLevel(before)
    assert [record.getMessage() for record in records] == ["vLLM is starting"]


async def test_an_expert_that_could_come_in_only_by_evicting_is_said_to_be_tight() -> None:
    host = await started(*(model(name) for name in "abcd"))
    for name in "abc":
        await host.whole(name, request(), 1)
    assert (await host.record_routing_stats())["tight"] == ["d"]


async def test_pinned_experts_are_loaded_before_the_host_is_ready() -> None:
    host = await started(model("a"), model("b"), pins=("b",))
    assert (await host.state())["resident"] == ["b"] and host.loaded_s.keys() == {"b"}


async def test_a_pinned_expert_that_cannot_be_loaded_is_reported_and_the_others_answer() -> None:
    """A host that restarts after files have gone must not leave its pool without a process."""
    host = await started(model("a"), model("bad", "fake://fail?at=load"), pins=("a", "bad"))
    state = await host.state()
    assert (
        state["resident"] == ["a"] and state["failed"].keys() == {"bad"} and "failed to load" in state["failed"]["bad"]
    )
    assert (await host.whole("a", request("hi"), 1)).text == "HI"  # type: ignore[union-attr]
    assert isinstance(await host.whole("bad", request(), 1), EngineError)
    await host.reconfigure(catalog(model("a"), generation=2))
    assert (await host.state())["failed"] == {}, "it is not pinned here any more"


async def test_calls_are_counted_by_gateway_and_residency_from_arrival_to_the_end() -> None:
    host = await started(model("a"), ExpertSpec(name="x", kind=Kind.ADAPTER, base="a", source="fake://echo"))
    streams = [host.stream(name, request(), 1, call) for name, call in (("a", "g1/0"), ("x", "g1/1"), ("x", "g2/0"))]
    for stream in streams:
        await anext(stream)
    report = await host.record_routing_stats()
    assert report["calls"] == {"g1": {"a": 2}, "g2": {"a": 1}} and report["places"] == {"a": 8}
    await streams[0].aclose()
    assert [piece async for piece in streams[1]]
    assert (await host.record_routing_stats())["calls"] == {"g2": {"a": 1}}
    await streams[2].aclose()
    assert isinstance(await host.whole("nobody", request(), 1, "g1/2"), UnknownModel)
    report = await host.record_routing_stats()
    assert report["calls"] == {} and report["answer_s"].keys() == {"a"}


async def test_a_new_catalog_serves_new_experts_and_new_weights_of_old_ones_without_a_restart() -> None:
    host = await started(model("a", version=1))
    running = host.stream("a", request("still the old one"), 1)
    first = await anext(running)
    changed = catalog(model("a", "fake://echo", version=2), model("b"), generation=2)
    await host.reconfigure(changed)
    assert first.text + "".join([c.text async for c in running if isinstance(c, Chunk)]) == "STILL THE OLD ONE"
    assert [(await host.whole(name, request("Hi"), 2)).text for name in "ab"] == ["Hi", "HI"]  # type: ignore[union-attr]
    assert (await host.state())["loads"] == {"a": 2, "b": 1}
    await host.reconfigure(catalog(model("b"), generation=3))
    assert isinstance(await host.whole("a", request(), 3), UnknownModel)


async def test_experts_move_between_pools_and_requests_that_were_routed_before_are_answered_where_they_arrive() -> None:
    config = Config.model_validate({"host": {"budget": 3 * 2**20, "pins": ["a"]}})
    one, two = HostPoolConfig(name="one", experts=("a",)), HostPoolConfig(name="two", experts=("b",))
    config = config.with_pools((one, two))
    known = snapshot(model("a"), model("b"), model("c"))
    hosts = [ExpertHost(config, pool) for pool in (one, two)]

    async def push(generation: int, **experts: tuple[str, ...]) -> None:
        pools = [HostPoolConfig(name=name, experts=names) for name, names in experts.items()]
        pushed = Catalog.of(config.with_pools(pools), known, generation).to_json()
        for host in hosts:
            await host.reconfigure(pushed)

    await push(1, one=("a",), two=("b",))
    assert [(await host.state())["resident"] for host in hosts] == [["a"], []]
    assert isinstance(await hosts[1].whole("a", request(), 1), UnknownModel)
    await push(2, one=("c",), two=("b", "a"))
    assert (await hosts[1].whole("a", request("hi"), 2)).text == "HI"  # type: ignore[union-attr]
    assert (await hosts[0].whole("c", request("hi"), 2)).text == "HI"  # type: ignore[union-attr]
    assert (await hosts[0].whole("a", request("hi"), 1)).text == "HI", "by a gateway that has the catalog before"  # type: ignore[union-attr]
    pinned = [{each["name"] for each in (await host.state())["weights"] if each["pinned"]} for host in hosts]
    assert pinned == [set(), {"a"}]


async def test_a_host_that_starts_after_an_expert_left_its_pool_names_the_pools_that_serve_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = (HostPoolConfig(name="one", experts=("a",)), HostPoolConfig(name="two", experts=("b",)))
    config, known = Config(host={"budget": 3 * 2**20}).with_pools(pools), snapshot(model("a"), model("b"))  # type: ignore[arg-type]
    moved = config.with_pools([HostPoolConfig(name="one", experts=()), HostPoolConfig(name="two", experts=("b", "a"))])
    restarted = ExpertHost(config, pools[0])
    await restarted.reconfigure(Catalog.of(moved, known, 2).to_json())
    (streamed,) = await pieces(restarted, "a", request(), generation=1)
    loaded = await restarted.load(["a"], 1)
    for error in (streamed, await restarted.whole("a", request(), 1), loaded, await restarted.unload(["a"], 0.0, 1)):
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, NotServedHere) and "'a' has moved from the pool 'one'" in str(copy)
        assert (copy.pools, copy.generation, copy.status, copy.retryable) == (("two",), 2, 503, True)
    assert isinstance(await restarted.whole("nobody", request(), 1), UnknownModel), "it is registered nowhere"
    monkeypatch.setattr("coe.serve.cluster.expert_host.CATCH_UP_S", 0.01)
    early = await restarted.whole("a", request(), 3)
    assert isinstance(early, NotServedHere) and early.pools == (), "a catalog that comes may bring it"


async def test_a_pinned_expert_that_comes_to_a_host_is_loaded_there_before_it_is_asked_for() -> None:
    config = Config.model_validate({"host": {"budget": 3 * 2**20, "pins": ["a"]}})
    pools = (HostPoolConfig(name="one", experts=("a",)), HostPoolConfig(name="two", experts=("b",)))
    known = snapshot(model("a"), model("b"))
    host = ExpertHost(config.with_pools(pools), pools[1])
    await host.reconfigure(Catalog.of(config.with_pools(pools), known).to_json())
    assert (await host.state())["resident"] == []
    swapped = [
        pool.model_copy(update={"experts": other.experts}) for pool, other in zip(pools, pools[::-1], strict=True)
    ]
    await host.reconfigure(Catalog.of(config.with_pools(swapped), known, 2).to_json())
    for _ in range(500):
        if (await host.state())["resident"] == ["a"]:
            break
        await asyncio.sleep(0.01)
    assert (await host.state())["resident"] == ["a"]


async def test_pins_that_change_are_loaded_and_former_ones_may_leave() -> None:
    config = Config.model_validate({"host": {"budget": 2 * 2**20, "pins": ["a"]}})
    known = snapshot(model("a"), model("b"), model("c"))
    host = ExpertHost(config, config.serve.pools[0])
    await host.reconfigure(Catalog.of(config, known).to_json())
    assert (await host.state())["resident"] == ["a"]
    later = config.model_copy(update={"host": config.host.model_copy(update={"pins": ("b", "c")})})
    await host.reconfigure(Catalog.of(later, known, 2).to_json())
    for _ in range(500):
        if (await host.state())["resident"] == ["b", "c"]:
            break
        await asyncio.sleep(0.01)
    state = await host.state()
    assert state["resident"] == ["b", "c"] and state["failed"] == {}, "the room of the former pin"


async def test_a_request_routed_by_a_later_catalog_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = await started(model("a"))
    early = asyncio.create_task(host.whole("b", request("hi"), 2))
    await asyncio.sleep(0.01)
    assert not early.done()
    await host.reconfigure(catalog(model("a"), model("b"), generation=2))
    assert (await early).text == "HI"  # type: ignore[union-attr]
    monkeypatch.setattr("coe.serve.cluster.expert_host.CATCH_UP_S", 0.01)
    assert (await host.whole("a", request("hi"), 9)).text == "HI"  # type: ignore[union-attr]  # it never came


async def test_a_reader_that_stops_stops_the_expert() -> None:
    host = await started(model("a"))
    async with aclosing(host.stream("a", request(), 1)) as stream:
        await anext(stream)
    assert (await host.state())["busy"] == 0


def test_a_pool_serves_its_experts_with_their_bases_and_pins_only_what_it_serves() -> None:
    everything = snapshot(
        model("a"), model("b"), ExpertSpec(name="x", kind=Kind.ADAPTER, base="b", source="fake://echo")
    )
    pool = HostPoolConfig(experts=("x",), budget=2**30)
    served = serving(everything, pool)
    assert set(served) == {"x", "b"} and serving(everything, POOL) is everything
    config = own_config(Config.model_validate({"host": {"pins": ["a", "b"], "aging_s": 3}}), pool, served)
    assert (config.host.pins, config.host.budget, config.host.aging_s) == (("b",), 2**30, 3)
    assert own_config(config, HostPoolConfig(pins=("x",)), served).host.pins == ("x",)
    with pytest.raises(ConfigError, match="serve.pools 'hosts'.*did you mean 'x'"):
        serving(everything, HostPoolConfig(experts=("xx",)))


def test_a_pool_knows_the_peers_of_its_composed_experts_and_calls_go_to_the_pool_that_names_them() -> None:
    def composed(name: str, architecture: str, *members: str) -> ExpertSpec:
        return ExpertSpec(name=name, kind=Kind.COMPOSED, architecture=architecture, members=members, source="folder")

    everything = snapshot(
        model("first"),
        model("peer"),
        model("other"),
        ExpertSpec(name="foreign", kind=Kind.ADAPTER, base="other", source="fake://echo"),
        composed("noted", "notes", "first", "peer", "foreign"),
        composed("together", "mot", "first", "peer"),
    )
    answering = HostPoolConfig(name="answering", experts=("noted",))
    aside = HostPoolConfig(name="aside", experts=("foreign", "together"))
    known = {"noted", "first", "peer", "foreign", "other"}
    assert set(serving(everything, answering)) == known, "an artifact is checked against all members and their bases"
    assert called_in(everything, answering, (answering, aside)) == {"noted", "first"}
    assert called_in(everything, aside, (answering, aside)) == {"foreign", "other", "together", "first", "peer"}
    assert called_in(everything, answering, (answering,)) == known, "no other pool names the peers"
    assert called_in(everything, POOL, (answering, POOL)) == set(everything)
    config = Config.model_validate(
        {"host": {"pins": ["peer", "first"]}, "serve": {"pools": [answering.model_dump(), aside.model_dump()]}}
    )
    assert own_config(config, answering, everything).host.pins == ("first",), "peers are not loaded there"
    assert own_config(config, aside, everything).host.pins == ("peer", "first")


def test_a_catalog_is_what_some_pool_serves_and_comes_back_from_json_as_it_was() -> None:
    everything = snapshot(model("a", tags=frozenset({"t"})), model("b"), version=7)
    config = Config.model_validate(
        {"policies": {"default": {"expert": "a"}}, "serve": {"pools": [{"name": "one", "experts": ["a"]}]}}
    )
    made = Catalog.of(config, everything, generation=3)
    assert set(made.snapshot) == {"a"} and made.policies == {"default": PolicyConfig(expert="a")}
    assert Catalog.from_json(made.to_json()) == made
    measured = Catalog.of(config, Snapshot(7, everything.experts, {"a": 12.5}))
    assert Catalog.from_json(measured.to_json()).snapshot.tokens_per_s == {"a": 12.5}


async def produce(*delays: float) -> AsyncGenerator[Chunk, None]:
    for i, delay in enumerate(delays):
        await asyncio.sleep(delay)
        yield Chunk(str(i))
    yield Chunk("", "stop", Usage(1, len(delays)))


@in_virtual_time
async def test_pieces_that_come_together_travel_together_the_first_and_the_last_at_once() -> None:
    assert [chunk.text async for chunk in coalesce(produce(0, 0, 0, 0), lambda: 10.0)] == ["0", "123"]


@in_virtual_time
async def test_no_text_is_held_while_an_expert_thinks() -> None:
    texts = [chunk.text async for chunk in coalesce(produce(0, 0, 0.2), lambda: 0.01)]
    assert texts[:3] == ["0", "1", "2"]


def test_chunks_are_fewer_the_more_answers_there_are_within_what_a_reader_bears() -> None:
    assert [pace(answers) for answers in (0, 1, 12, 50, 10_000)] == [0.025, 0.025, 0.025, 0.1, 0.25]


async def test_coalescing_stops_its_source_and_passes_its_errors_on() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Chunk, None]:
        try:
            yield Chunk("a")
            await asyncio.sleep(60)
        finally:
            closed.set()

    stream = coalesce(endless(), lambda: 0.01)
    await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await stream.aclose()
    assert closed.is_set()

    async def failing() -> AsyncGenerator[Chunk, None]:
        yield Chunk("a")
        raise EngineError("down")

    with pytest.raises(EngineError, match="down"):
        [chunk async for chunk in coalesce(failing(), lambda: 0.01)]


async def test_a_host_answers_over_its_links_as_over_serve_and_finishes_them_at_its_end(tmp_path: Path) -> None:
    host = await started(model("up"))
    await host._listen(tmp_path / "coe")
    address = (await host.record_routing_stats())["address"]
    one = await Link.to(address)
    try:
        streamed = [piece async for piece in one.ask("up", request(), 1, "g/1")]
        whole = [piece async for piece in one.ask("up", request(stream=False), 1, "g/2")]
        assert "".join(piece.text for piece in streamed) == whole[0].text == "ONE TWO THREE" and len(whole) == 1
        assert streamed[-1].usage == whole[0].usage and streamed[-1].finish_reason == "stop"
        (error,) = [piece async for piece in one.ask("nobody", request(), 1, "g/3")]
        assert isinstance(error, UnknownModel)
        assert await host.record_autoscaling_stats() == {IN_FLIGHT: 0.0}
        last = asyncio.create_task(anext(one.ask("up", request(stream=False), 1, "g/4")))
        await asyncio.sleep(0)
        ending = host.__del__()
        assert ending is not None
        await ending
        assert (await last).text == "ONE TWO THREE"
    finally:
        one.end()
    assert host.__del__() is None and list((tmp_path / "coe").iterdir()) == []


async def test_calls_are_counted_for_autoscaling_while_they_last() -> None:
    host = await started(model("up"))
    answer = host.stream("up", request(), 1, "g/1")
    await anext(answer)
    assert await host.record_autoscaling_stats() == {IN_FLIGHT: 1.0}
    await answer.aclose()
    assert await host.record_autoscaling_stats() == {IN_FLIGHT: 0.0}


def test_links_carry_the_chunks_of_200_streams_of_20_tokens_a_second_in_less_than_the_time_of_two_tokens() -> None:
    assert pace(200, LINK_CHUNKS_PER_S, LINK_SLOWEST_S) <= 0.05
    assert pace(10_000, LINK_CHUNKS_PER_S, LINK_SLOWEST_S) < 0.1


async def test_a_host_loads_and_unloads_on_demand_and_reports_what_is_in_memory() -> None:
    host = await started(model("a", ttl_s=60), model("b"), model("big").model_copy(update={"size_bytes": 2**30}))
    assert await host.load(["a", "b"], 1) == {"pool": "hosts", "loaded": ("a", "b")}
    assert [(each["name"], each["state"]) for each in (await host.state())["weights"]] == [
        ("a", "resident"),
        ("b", "resident"),
    ]
    report = await host.record_routing_stats()
    told = report["weights"]
    assert told["b"] == {"state": "resident", "size_bytes": 2**20, "unload_in_s": None}
    assert 0 < told["a"]["unload_in_s"] <= 60
    assert pickle.loads(pickle.dumps(HostStatus.of("h", report))).weights == told
    assert await host.unload(["b"], 0.0, 1) == {"pool": "hosts", "unloaded": ("b",)}
    refused = await host.load(["big"], 1)
    assert isinstance(refused, BudgetExceeded) and "'big' need 1,024 MiB" in str(pickle.loads(pickle.dumps(refused)))
    assert isinstance(await host.unload(["c"], 0.0, 1), UnknownModel)
