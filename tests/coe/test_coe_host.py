"""The host over fake experts: requests grouped by residency, and nothing held after any end."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from coe.config import Config
from coe.engines.base import Adapter, Member
from coe.engines.fake import FakeEngine
from coe.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    UnknownModel,
    Unsupported,
    WeightsError,
)
from coe.host import Host
from coe.hosting import open_host
from coe.types import Chunk, GenerateRequest, Usage
from registry.errors import DigestMismatch
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

MIB = 2**20


def model(name: str, source: str = "fake://upper", size: int = 4 * MIB, **fields: object) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source=source, size_bytes=size, **fields)  # type: ignore[arg-type]


def adapter(name: str, base: str, source: str = "fake://echo") -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.ADAPTER, base=base, source=source)


def request(text: str = "hello there", **fields: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **fields)  # type: ignore[arg-type]


def make(*specs: ExpertSpec, engine: FakeEngine | None = None, budget: int = 10 * MIB, **options: object) -> Host:
    snapshot = Snapshot(version=1, experts={spec.name: spec for spec in specs})
    return Host(
        snapshot,
        {"fake": engine or FakeEngine()},
        budget_bytes=budget,
        **{"locate": lambda spec: Path("/nowhere"), **options},  # type: ignore[arg-type]
    )


async def ask(host: Host, name: str, wanted: GenerateRequest | None = None) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, wanted or request())])


async def test_an_expert_answers_and_stays_resident() -> None:
    engine = FakeEngine()
    host = make(model("up"), engine=engine)
    assert [await ask(host, "up"), await ask(host, "up")] == ["HELLO THERE", "HELLO THERE"]
    assert engine.tally.loads == {"up": 1} and host.cache.resident == {"up"}
    await host.aclose()
    assert engine.tally.unloads == {"up": 1}


async def test_adapters_share_the_one_load_of_their_base() -> None:
    engine = FakeEngine()
    host = make(model("base"), adapter("x", "base"), adapter("y", "base"), engine=engine)
    answers = await asyncio.gather(*(ask(host, name) for name in ("x", "y", "base", "x")))
    assert answers == ["[x] hello there", "[y] hello there", "HELLO THERE", "[x] hello there"]
    assert engine.tally.loads == {"base": 1}


async def test_mixed_requests_are_batched_by_expert_each_loaded_once() -> None:
    """Three experts, room for two, requests interleaved: in order of arrival this would load sixty times."""
    engine = FakeEngine(token_delay_s=0.001)
    host = make(*(model(name) for name in "abc"), engine=engine, aging_s=60.0)
    answers = await asyncio.gather(*(ask(host, name, request(f"{name} {i}")) for i in range(20) for name in "abc"))
    assert answers == [f"{name.upper()} {i}" for i in range(20) for name in "abc"]
    assert engine.tally.loads == {"a": 1, "b": 1, "c": 1}


async def test_capacity_bounds_what_runs_at_once_and_everything_is_answered() -> None:
    engine = FakeEngine(token_delay_s=0.001, capacity=3)
    host = make(model("a"), engine=engine)
    answers = await asyncio.gather(*(ask(host, "a", request(str(i))) for i in range(20)))
    assert answers == [str(i) for i in range(20)]
    assert engine.tally.most_in_flight["a"] == 3


class Queueing:
    """An expert that takes two requests more than it generates for."""

    def __init__(self, expert: Any) -> None:
        self.spec, self.capacity, self.ahead = expert.spec, expert.capacity, 2
        self._expert = expert
        self.taken = self.most = 0

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        self.taken += 1
        self.most = max(self.most, self.taken)
        try:
            async for chunk in self._expert.generate(request, adapter):
                yield chunk
        finally:
            self.taken -= 1


async def test_an_engine_that_keeps_requests_waiting_is_given_more_than_its_capacity() -> None:
    class Engine(FakeEngine):
        async def load(self, spec: ExpertSpec, path: Path) -> Any:
            return Queueing(await super().load(spec, path))

    host = make(model("a"), engine=Engine(token_delay_s=0.001, capacity=3))
    await ask(host, "a")  # its capacity is known now
    answers = await asyncio.gather(*(ask(host, "a", request(str(i))) for i in range(20)))
    assert answers == [str(i) for i in range(20)]
    assert host.capacity("a") == 3
    expert: Any = host.cache.peek("a")
    assert expert.most == 5


@pytest.mark.parametrize("ahead", [-1, "2"])
async def test_an_engine_that_states_no_number_of_further_requests_is_refused(ahead: object) -> None:
    class Wrong(FakeEngine):
        async def load(self, spec: ExpertSpec, path: Path) -> Any:
            expert: Any = await super().load(spec, path)
            expert.ahead = ahead
            return expert

    with pytest.raises(EngineError, match="`ahead` that is not 0 or more"):
        await ask(make(model("a"), engine=Wrong()), "a")


async def test_past_the_aging_bound_a_rare_expert_gets_its_turn_under_constant_load() -> None:
    engine = FakeEngine(token_delay_s=0.002, capacity=2)
    host = make(model("busy", size=8 * MIB), model("rare", size=8 * MIB), engine=engine, aging_s=0.05)
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            await ask(host, "busy")

    clients = [asyncio.create_task(load()) for _ in range(6)]
    await asyncio.sleep(0.02)
    assert await asyncio.wait_for(ask(host, "rare"), 5) == "HELLO THERE"
    stop.set()
    await asyncio.gather(*clients)


async def test_a_client_that_leaves_at_any_moment_frees_its_place() -> None:
    engine = FakeEngine(token_delay_s=0.005, capacity=1)
    host = make(model("a", size=8 * MIB), model("b", size=8 * MIB), engine=engine)
    streaming = host.ask("a", request("one two three four"))
    await anext(streaming)
    waiting = [asyncio.create_task(ask(host, name)) for name in ("a", "b", "a")]
    await asyncio.sleep(0.001)
    for task in waiting[:2]:
        task.cancel()
    await streaming.aclose()
    assert await asyncio.wait_for(waiting[2], 5) == "HELLO THERE"
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not +host.in_flight and engine.tally.cancelled["a"] == 1
    assert await ask(host, "b") == "HELLO THERE"


async def test_a_client_that_leaves_in_the_instant_of_its_admission_frees_its_place() -> None:
    engine = FakeEngine(capacity=1)
    host = make(model("a"), engine=engine)
    first = host.ask("a", request("one two"))
    await anext(first)
    second = asyncio.create_task(ask(host, "a"))
    await asyncio.sleep(0)
    await first.aclose()  # admits the second ...
    second.cancel()  # ... which is cancelled before it runs on
    await asyncio.gather(second, return_exceptions=True)
    assert not +host.in_flight
    assert await asyncio.wait_for(ask(host, "a"), 5) == "HELLO THERE"


async def test_errors_of_the_engine_reach_the_caller_and_free_the_place() -> None:
    host = make(model("broken", "fake://fail"), model("unloadable", "fake://fail?at=load"), model("fine"))
    for name in ("broken", "unloadable"):
        with pytest.raises(EngineError):
            await ask(host, name)
    assert not +host.in_flight and await ask(host, "fine") == "HELLO THERE"


async def test_altered_files_are_refused_at_load_with_the_reason() -> None:
    def locate(spec: ExpertSpec) -> Path:
        raise DigestMismatch("model.safetensors differs")

    with pytest.raises(WeightsError, match="'up' cannot be loaded: model.safetensors differs"):
        await ask(make(model("up"), locate=locate), "up")


async def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(OutOfMemory, match="'huge' need 64 MiB, the budget is 10 MiB"):
        await ask(make(model("huge", size=64 * MIB)), "huge")


async def test_unknown_experts_and_negative_lengths_are_refused() -> None:
    host = make(model("up"))
    with pytest.raises(UnknownModel, match="did you mean 'up'"):
        await ask(host, "upp")
    with pytest.raises(InvalidRequest, match="max_tokens must be at least 1, got -5"):
        request(max_tokens=-5)


async def test_a_deadline_ends_a_slow_answer_and_frees_its_place() -> None:
    host = make(model("slow"), engine=FakeEngine(token_delay_s=1.0))
    with pytest.raises(DeadlineExceeded, match="'slow' did not finish within 0.05 s"):
        await ask(host, "slow", request(deadline_s=0.05))
    assert not +host.in_flight
    assert await ask(make(model("fast")), "fast", request(deadline_s=5)) == "HELLO THERE"


async def test_a_deadline_ends_the_wait_for_a_place() -> None:
    host = make(model("slow"), engine=FakeEngine(token_delay_s=0.2, capacity=1))
    first = asyncio.create_task(ask(host, "slow"))
    while not host.answering:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match="within 0.05 s"):
        await ask(host, "slow", request(deadline_s=0.05))
    assert host.busy == 1, "nothing of it waits any more"
    assert await first == "HELLO THERE" and not host.busy


async def test_an_engine_that_times_out_by_itself_does_not_pass_for_the_deadline() -> None:
    async def tired(_: float) -> None:
        raise TimeoutError("the engine's own")

    host = make(model("slow"), engine=FakeEngine(sleep=tired))
    with pytest.raises(EngineError, match="'slow' failed: TimeoutError: the engine's own"):
        await ask(host, "slow", request(deadline_s=5))
    assert not +host.in_flight


async def test_a_full_line_refuses_instead_of_growing() -> None:
    host = make(model("a"), engine=FakeEngine(token_delay_s=0.01, capacity=1), max_waiting=2)
    await ask(host, "a")
    tasks = [asyncio.create_task(ask(host, "a")) for _ in range(5)]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [str, str, str, Overloaded, Overloaded]
    assert outcomes[:3] == ["HELLO THERE"] * 3


async def test_load_times_are_zero_for_the_resident_and_estimated_for_the_rest() -> None:
    host = make(model("a"), model("b"), adapter("x", "a"))
    await ask(host, "a")
    load_s = host.load_s()
    assert load_s["a"] == load_s["x"] == 0.0 and load_s["b"] > 0


async def test_loads_of_experts_without_bytes_say_nothing_of_the_rate() -> None:
    host = make(model("light", size=0), model("heavy"), engine=FakeEngine(load_delay_s=0.001))
    await ask(host, "light")
    assert host.load_s()["light"] == 0.0 < host.load_s()["heavy"] < 1


async def test_a_pinned_adapter_pins_its_base() -> None:
    host = make(model("base"), adapter("x", "base"), model("b"), model("c"), pins=("x",))
    for name in ("x", "b", "c", "b", "c"):
        await ask(host, name)
    assert "base" in host.cache.resident


async def test_an_answer_says_where_its_seconds_went() -> None:
    host = make(model("a"), model("b", size=8 * MIB), engine=FakeEngine(load_delay_s=0.02, token_delay_s=0.005))
    chunks = [chunk async for chunk in host.ask("a", request())]
    timing = chunks[-1].timing
    assert timing is not None and timing.load_s >= 0.02 and timing.engine_s >= 0.01
    assert all(chunk.timing is None for chunk in chunks[:-1])
    running = asyncio.create_task(ask(host, "a", request("one two three four")))
    await asyncio.sleep(0.005)
    waited = [chunk async for chunk in host.ask("b", request())][-1].timing  # no room before `a` is done
    await running
    assert waited is not None and waited.queue_s + waited.load_s > 0.02


async def test_a_new_snapshot_is_served_at_once_and_what_runs_ends_on_the_old_one() -> None:
    engine = FakeEngine(token_delay_s=0.005)
    host = make(model("a", version=1), adapter("x", "a"), engine=engine)
    running = host.ask("a", request("one two three"))
    first = await anext(running)
    new = {"a": model("a", "fake://echo", version=2), "x": adapter("x", "a"), "b": model("b")}
    host.update(Snapshot(2, new))
    assert await ask(host, "a") == "hello there" and await ask(host, "x") == "[x] hello there"
    assert await ask(host, "b") == "HELLO THERE"
    assert first.text + "".join([chunk.text async for chunk in running]) == "ONE TWO THREE"
    assert host.loads == {"a": 2, "b": 1} and host.resident == {"a", "b"}
    host.update(Snapshot(3, {"b": model("b")}))
    with pytest.raises(UnknownModel, match="'a' is not in"):
        await ask(host, "a")


async def test_old_weights_leave_when_the_room_is_needed() -> None:
    engine = FakeEngine()
    host = make(model("a", size=6 * MIB, version=1), engine=engine)
    await ask(host, "a")
    host.update(Snapshot(2, {"a": model("a", "fake://echo", size=6 * MIB, version=2)}))
    assert await ask(host, "a") == "hello there"
    assert (engine.tally.loads, engine.tally.unloads) == ({"a": 2}, {"a": 1})


async def test_pins_follow_the_snapshot_and_one_that_is_gone_refuses_it() -> None:
    host = make(model("a", version=1), pins=("a",))
    host.update(Snapshot(2, {"a": model("a", version=2)}))
    assert host.cache.pins == {"a@2"}
    with pytest.raises(UnknownModel):
        host.update(Snapshot(3, {"b": model("b")}))
    assert "a" in host.snapshot


async def test_what_waits_and_what_it_took_before_say_how_long_a_new_request_would_wait() -> None:
    engine = FakeEngine(token_delay_s=0.01, capacity=1)
    host = make(model("a"), model("b", size=2 * MIB), engine=engine)
    assert host.queue_s() == {"a": 0.0, "b": 0.0} and host.busy == 0
    await ask(host, "a")
    clients = [asyncio.create_task(ask(host, "a")) for _ in range(4)]
    await asyncio.sleep(0.005)
    told = host.queue_s()
    assert told["a"] >= 3 * 0.02 and told["b"] == 0.0 and host.busy == 4
    assert host.load_s()["a"] == 0.0 < host.load_s()["b"]
    assert host.fits_free("a") and host.fits_free("b")
    await asyncio.gather(*clients)


async def test_an_engine_that_a_later_snapshot_needs_is_made_then() -> None:
    from coe.config import Config
    from coe.hosting import open_host, update_host

    config = Config.model_validate({"engines": {"fake": {"capacity": 3}}})
    remote = ExpertSpec(name="far", kind=Kind.REMOTE, source="http://127.0.0.1:9/v1")
    async with open_host(config, Snapshot(1, {"far": remote})) as host:
        await update_host(host, config, Snapshot(2, {"far": remote, "near": model("near")}))
        host.cache.budget_bytes = 10 * MIB
        assert await ask(host, "near") == "HELLO THERE"
        assert host.cache.peek("near").capacity == 3  # type: ignore[union-attr]


async def test_the_first_weights_that_come_with_a_later_snapshot_get_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from coe.config import Config
    from coe.hosting import open_host, update_host

    monkeypatch.setattr("coe.engines.hf.load.free_bytes", lambda device: 1000)
    monkeypatch.setattr("coe.engines.hf.load.choose_device", lambda device: "cpu")
    remote = ExpertSpec(name="far", kind=Kind.REMOTE, source="http://127.0.0.1:9/v1")
    weights = ExpertSpec(name="near", kind=Kind.MODEL, source="/models/near", size_bytes=10)
    async with open_host(Config(), Snapshot(1, {"far": remote})) as host:
        assert host.cache.budget_bytes == 0
        await update_host(host, Config(), Snapshot(2, {"far": remote, "near": weights}))
        assert host.cache.budget_bytes == 800 and "near" in host.snapshot
        monkeypatch.setattr("coe.engines.hf.load.free_bytes", lambda device: 5)
        await update_host(host, Config(), Snapshot(3, {"near": weights}))
        assert host.cache.budget_bytes == 800  # later loads must not shrink its reserved bytes


async def test_a_prefetched_expert_is_there_when_it_is_asked_and_the_one_at_work_stays() -> None:
    engine = FakeEngine(load_delay_s=0.05, token_delay_s=0.005)
    host = make(model("a"), model("b"), adapter("x", "b"), model("c"), engine=engine)
    await ask(host, "a")
    working = asyncio.create_task(ask(host, "a", request("one two three four")))
    await asyncio.sleep(0)
    assert host.prefetch("x") and host.cache.loading == {"b"}
    assert await asyncio.wait_for(working, 0.045) == "ONE TWO THREE FOUR"
    first = [chunk async for chunk in host.ask("x", request())][-1].timing
    assert first is not None and first.load_s < 0.05
    assert not host.prefetch("c", keep=["a", "x"]) and host.prefetch("c", keep=["x"])
    assert await ask(host, "c") == "HELLO THERE" and host.resident == {"b", "c"}
    assert engine.tally.loads == {"a": 1, "b": 1, "c": 1}


async def test_a_prefetch_does_not_take_the_room_of_those_who_wait() -> None:
    engine = FakeEngine(load_delay_s=0.01, token_delay_s=0.005, capacity=1)
    host = make(model("a"), model("b"), model("c"), engine=engine)
    await ask(host, "a")
    await ask(host, "b")
    clients = [asyncio.create_task(ask(host, name)) for name in ("a", "a", "b")]
    await asyncio.sleep(0)
    assert not host.prefetch("c")
    await asyncio.gather(*clients)
    assert host.prefetch("c") and engine.tally.loads == {"a": 1, "b": 1}
    await host.aclose()


def test_what_must_be_resident_has_a_size_before_it_is_loaded() -> None:
    host = make(model("a"), adapter("x", "a"))
    assert host.footprint("a") == host.footprint("x") == 4 * MIB
    with pytest.raises(UnknownModel):
        host.prefetch("y")


class Duet:
    """A composed expert: the answers of its members, one after the other."""

    def __init__(self, spec: ExpertSpec, members: Mapping[str, Member]) -> None:
        self.spec, self.capacity, self._members = spec, 8, members

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        assert adapter is None
        for name, member in self._members.items():
            texts = [chunk.text async for chunk in member.expert.generate(request, member.adapter)]
            yield Chunk(f"{name}: {''.join(texts)}; ")
        yield Chunk("", "stop", Usage(1, 1))


class DuetEngine(FakeEngine):
    def compose(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> Duet:
        return Duet(spec, members)


def duet(*members: str) -> ExpertSpec:
    return ExpertSpec(name="duet", kind=Kind.COMPOSED, members=members, architecture="duet")


@pytest.fixture
def duets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "duet", "fake")


@pytest.mark.usefixtures("duets")
async def test_a_composed_expert_holds_the_weights_of_all_its_members_while_it_answers() -> None:
    engine = DuetEngine(load_delay_s=0.001, token_delay_s=0.001)
    host = make(model("a"), model("b"), adapter("x", "b"), duet("x", "a"), model("c"), engine=engine)
    assert host.footprint("duet") == 8 * MIB and host.footprint("duet", "x", "c") == 12 * MIB
    assert host.load_s()["duet"] == host.load_s()["a"] + host.load_s()["x"] > 0
    assert host.fits_free("duet") and not host.is_resident("duet") and host.capacity("duet") is None
    answers = await asyncio.gather(*(ask(host, name) for name in ("duet", "a", "x", "c", "duet")))
    both = "x: [x] hello there; a: HELLO THERE; "
    assert answers == [both, "HELLO THERE", "[x] hello there", "HELLO THERE", both]
    assert host.busy == 0 and not +host.in_flight, "a request counts once, and leaves no place taken"
    assert engine.tally.loads == {"a": 1, "b": 1, "c": 1}, "both weights came in once, and stayed until c needed room"


@pytest.mark.usefixtures("duets")
async def test_the_weights_of_a_composed_expert_come_in_together_or_not_at_all() -> None:
    host = make(model("a"), model("b"), duet("a", "b"), engine=DuetEngine(), pins=("duet",))
    assert host.cache.pins == {"a", "b"} and host.prefetch("duet") and host.cache.loading == {"a", "b"}
    assert await ask(host, "duet") == "a: HELLO THERE; b: HELLO THERE; "
    assert host.load_s()["duet"] == 0 and host.is_resident("duet") and host.capacity("duet") == 8
    narrow = make(model("a"), model("b"), duet("a", "b"), engine=DuetEngine(), budget=5 * MIB)
    with pytest.raises(OutOfMemory, match=r"^'duet' needs its members in memory together: 'a', 'b' need 8 MiB"):
        await ask(narrow, "duet")
    assert not narrow.resident and not narrow.prefetch("duet") and not narrow.cache.loading


@pytest.mark.usefixtures("duets")
async def test_waiting_requests_for_any_of_its_weights_delay_a_composed_expert() -> None:
    engine = DuetEngine(token_delay_s=0.01, capacity=1)
    host = make(model("a"), model("b"), model("c"), duet("a", "b"), engine=engine)
    await ask(host, "a")
    clients = [asyncio.create_task(ask(host, "a")) for _ in range(3)]
    await asyncio.sleep(0)
    waits = host.queue_s()
    assert waits["duet"] == waits["a"] > 0 and waits["b"] == waits["c"] == 0
    await asyncio.gather(*clients)


@pytest.mark.usefixtures("duets")
async def test_what_no_engine_can_do_is_refused_before_anything_is_loaded() -> None:
    engine = FakeEngine()
    host = make(model("a"), model("b"), duet("a", "b"), engine=engine)
    with pytest.raises(Unsupported, match="'a' cannot return 'latent'"):
        await ask(host, "a", request(wants="latent"))
    with pytest.raises(Unsupported, match="'duet' is a composed expert, and its engine 'fake' serves none"):
        await ask(host, "duet")
    assert not engine.tally.loads and host.busy == 0 and not +host.in_flight


async def test_an_adapter_needs_the_engine_of_its_base_and_no_other(tmp_path: Path) -> None:
    experts = (model("up"), ExpertSpec(name="tuned", kind=Kind.ADAPTER, base="up", source=str(tmp_path)))
    async with open_host(Config(), Snapshot(1, {spec.name: spec for spec in experts})) as host:
        assert set(host._engines.by_kind) == {"fake"} and host.cache.budget_bytes == 0


async def test_the_weights_of_an_engine_that_is_named_by_its_class_get_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.hf.load.free_bytes", lambda device: 1000)
    monkeypatch.setattr("coe.engines.fake.FakeEngine.weights", True)
    named = model("up", size=700).model_copy(update={"engine": "coe.engines.fake:FakeEngine"})
    async with open_host(Config(), Snapshot(1, {"up": named})) as host:
        assert host.cache.budget_bytes == 800 and await ask(host, "up") == "HELLO THERE"
    with pytest.raises(ConfigError, match=r"there is no engine 'fakee'; did you mean 'fake'\?"):
        async with open_host(Config(), Snapshot(1, {"up": named.model_copy(update={"engine": "fakee"})})):
            pass
