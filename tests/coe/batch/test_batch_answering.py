"""Answering work items: enough calls in flight, each unit written once, no repeated loads of a broken expert."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coe.batch import answering, records
from coe.batch.answering import Answerer, LoadCounter, WorkReport
from coe.batch.parts import ANSWERS, _call_record, _calls, _write, answers_name, read_calls
from coe.batch.records import CALLS, load_outcome
from coe.batch.stages import Unit
from coe.compose import ExpertCall
from coe.engines.fake import FakeEngine
from coe.errors import EngineError, WeightsError
from coe.host import Host
from coe.memory.failures import FIRST_S, IN_A_ROW
from coe.runs.storage import Folder
from coe.types import GenerateRequest
from registry.errors import DiskFull
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Message

PRICE = Price(input_usd_per_mtok=1, output_usd_per_mtok=2)


def spec(name: str, source: str, base: str | None = None, **more: Any) -> ExpertSpec:
    kind = Kind.ADAPTER if base else Kind.MODEL
    return ExpertSpec(name=name, kind=kind, source=source, base=base, size_bytes=10, context_length=40, **more)


SPECS = [
    spec("echo", "fake://echo", price=PRICE),
    spec("tuned", "fake://upper", base="echo"),
    spec("broken", "fake://fail?at=load"),
    spec("on-broken", "fake://upper", base="broken"),
    spec("flaky", "fake://fail"),
    spec("loud", "fake://upper"),
]


def host(engine: FakeEngine, budget_bytes: int = 100) -> Host:
    snapshot = Snapshot(version=1, experts={each.name: each for each in SPECS})
    return Host(snapshot, {"fake": engine}, budget_bytes=budget_bytes, locate=lambda spec: Path())


def write_calls(folder: Folder, part: int, experts: Sequence[str], calls: int, text: str = "hello") -> list[Unit]:
    """The calls of stage 0 of a part: some for each expert."""
    groups = []
    for expert in experts:
        requests = (GenerateRequest(messages=(Message("user", f"{text} {i}"),)) for i in range(calls))
        groups.append([_call_record(i, ExpertCall("0", expert, request)) for i, request in enumerate(requests)])
    _write(folder, _calls(0, part), CALLS, *groups)
    experts_by_name = {each.name: each for each in SPECS}
    bases = {each.name: each.residency(experts_by_name) for each in SPECS}
    return [Unit(part, number, expert, bases[expert], calls) for number, expert in enumerate(experts)]


def answers(folder: Folder, unit: Unit) -> list[dict[str, Any]]:
    with folder.open(answers_name(0, unit)) as file:
        table: pa.Table = pq.read_table(file)
    assert table.schema.equals(ANSWERS)
    return table.to_pylist()


async def work(on: Host, folder: Folder, units: Sequence[Unit], following: str | None = None) -> WorkReport:
    """The sum of a work item's reports."""
    reports: list[WorkReport] = []
    await Answerer(on, folder, 0, units, reports.append, following=following).run()
    return sum_of(reports)


def sum_of(reports: Sequence[WorkReport]) -> WorkReport:
    whole = WorkReport()
    for report in reports:
        whole += report
    return whole


async def test_every_call_is_answered_in_its_place(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    units = [unit for part in range(3) for unit in write_calls(folder, part, ["echo", "tuned"], 40)]
    report = await work(host(FakeEngine()), folder, units)
    assert (report.done, report.failed, report.loads) == (Counter(echo=120, tuned=120), Counter(), Counter(echo=1))
    assert report.prompt_tokens == Counter(echo=240, tuned=240)  # words
    assert report.completion_tokens == Counter(echo=240, tuned=360)
    assert report.loaded_bytes == 10 and report.load_s >= 0 and set(report.work_s) == {"echo"}
    assert WorkReport.of(json.loads(json.dumps(records.plain(report)))) == report
    plain, tuned = answers(folder, units[0]), answers(folder, units[1])
    assert [(a["row"], a["call"], a["text"]) for a in plain] == [(i, "0", f"hello {i}") for i in range(40)]
    assert tuned[7]["text"] == "[tuned] HELLO 7" and tuned[7]["cost_usd"] is None
    assert plain[0]["cost_usd"] == pytest.approx((2 * 1 + 2 * 2) / 1e6)


async def test_the_engine_is_kept_busy_and_not_more_across_units(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    engine = FakeEngine(capacity=4, token_delay_s=0.002)
    seen: list[int] = []

    class Watching(Host):
        async def ask(self, name: str, request: GenerateRequest) -> Any:
            seen.append(self.busy)
            async for chunk in super().ask(name, request):
                yield chunk

    on = Watching(host(engine).snapshot, {"fake": engine}, budget_bytes=100, locate=lambda spec: Path())
    units = [unit for part in range(40) for unit in write_calls(folder, part, ["echo"], 3)]
    await work(on, folder, units)
    assert engine.tally.most_in_flight["echo"] == 4
    assert max(seen) <= answering._WINDOW and max(seen[60:]) <= answering._AHEAD * 4


async def test_an_expert_that_cannot_be_loaded_is_tried_once_not_for_every_ask(tmp_path: Path) -> None:
    folder, tried = Folder.of(str(tmp_path)), Counter[str]()

    class Counting(FakeEngine):
        async def load(self, spec: ExpertSpec, path: Path) -> Any:
            tried[spec.name] += 1
            return await super().load(spec, path)

    units = write_calls(folder, 0, ["broken", "on-broken"], 200)
    report = await work(host(Counting()), folder, units)
    assert report.failed == Counter({"broken": 200, "on-broken": 200}) and not report.loads
    assert tried["broken"] <= 2  # for the calls that waited first, for the base and for its adapter
    assert {a["error"] for a in answers(folder, units[0])} == {answers(folder, units[0])[0]["error"]}
    assert "failed to load" in answers(folder, units[1])[199]["error"]


class Breaking(FakeEngine):
    """Its next loads fail with an error."""

    error: EngineError | None = None
    tries = 0

    async def load(self, spec: ExpertSpec, path: Path) -> Any:
        self.tries += 1
        if self.error is not None:
            raise self.error
        return await super().load(spec, path)


@pytest.mark.parametrize(
    ("error", "code"), [(WeightsError("torn"), "invalid_weights"), (EngineError("odd"), "engine_error")]
)
async def test_while_a_host_refuses_an_expert_the_error_is_that_of_its_last_load(
    tmp_path: Path, error: EngineError, code: str
) -> None:
    folder, engine, now_s = Folder.of(str(tmp_path)), Breaking(), 0.0
    engine.error = error
    snapshot = Snapshot(version=1, experts={each.name: each for each in SPECS})
    on = Host(snapshot, {"fake": engine}, budget_bytes=100, locate=lambda spec: Path(), clock=lambda: now_s)
    found = []
    for part in range(IN_A_ROW + 2):  # one work item after the other, each with a memory of its own
        units = write_calls(folder, part, ["echo"], 1)
        await work(on, folder, units)
        found += [load_outcome(record) for record in answers(folder, units[0])]
    assert engine.tries == IN_A_ROW and "echo" in on.unhealthy()  # the last two were refused
    assert {(type(each.error), each.error.code, str(each.error)) for each in found} == {(type(error), code, str(error))}
    engine.error, now_s = None, FIRST_S
    units = write_calls(folder, IN_A_ROW + 2, ["echo"], 1)
    assert (await work(on, folder, units)).failed == Counter() and engine.tries == IN_A_ROW + 1


async def test_an_expert_that_never_fits_is_an_error_of_every_row(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    units = write_calls(folder, 0, ["echo"], 50)
    report = await work(host(FakeEngine(), budget_bytes=5), folder, units)
    assert report.failed == Counter(echo=50) and "raise `host.budget`" in answers(folder, units[0])[49]["error"]


async def test_one_failure_or_wrong_request_is_not_the_end_of_the_others(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine()
    long = write_calls(folder, 1, ["echo"], 1, text="word " * 50)
    units = [*write_calls(folder, 0, ["flaky"], 5), *long, *write_calls(folder, 2, ["echo"], 5)]
    report = await work(host(engine), folder, units)
    assert report.failed == Counter(flaky=5, echo=1) and engine.tally.generations["flaky"] == 5
    assert "context" in answers(folder, long[0])[0]["error"]
    assert [a["error"] for a in answers(folder, units[2])] == [None] * 5


async def test_an_unexpected_error_is_recorded_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder.of(str(tmp_path))
    units = write_calls(folder, 0, ["echo"], 2)

    class Bug(FakeEngine):
        def load(self, spec: ExpertSpec, path: Path) -> Any:
            raise ZeroDivisionError("division by zero")

    await work(host(Bug()), folder, units)
    assert "ZeroDivisionError: division by zero" in answers(folder, units[0])[0]["error"]
    assert "expert 'echo' failed: ZeroDivisionError" in caplog.text


async def test_an_answer_that_does_not_end_is_an_error(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    units = write_calls(folder, 0, ["echo"], 1)

    class Cut(Host):
        async def ask(self, name: str, request: GenerateRequest) -> Any:
            async for chunk in super().ask(name, request):
                if chunk.finish_reason is None:
                    yield chunk

    on = Cut(host(FakeEngine()).snapshot, {"fake": FakeEngine()}, budget_bytes=100, locate=lambda spec: Path())
    await work(on, folder, units)
    assert "stopped without finishing" in answers(folder, units[0])[0]["error"]


async def test_the_next_expert_is_loaded_while_this_one_works_and_each_load_is_reported_once(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine(load_delay_s=0.02, token_delay_s=0.01, capacity=4)
    on = host(engine, budget_bytes=20)
    items = [write_calls(folder, part, [name], 12) for part, name in enumerate(("echo", "flaky", "echo", "loud"))]
    loads, reports = LoadCounter(on), []
    for units, following in zip(items, ("flaky", "echo", "loud", None), strict=True):
        present = on.resident
        await Answerer(on, folder, 0, units, reports.append, loads=loads, following=following).run()
        assert len(reports) == 1 or units[0].expert in present
    whole = sum_of(reports)
    assert whole.loads == engine.tally.loads == Counter(echo=1, flaky=1, loud=1) and whole.loaded_bytes == 30
    assert whole.done == Counter(echo=24, flaky=12, loud=12) and on.resident == {"echo", "loud"}


async def test_where_memory_holds_one_the_next_expert_waits_for_its_turn(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine(token_delay_s=0.001)
    on = host(engine, budget_bytes=15)
    for part, (name, following) in enumerate((("echo", "loud"), ("loud", None))):
        report = await work(on, folder, write_calls(folder, part, [name], 20), following)
        assert on.resident == {name} and report.loads == Counter({name: 1})


async def test_a_stopped_work_item_leaves_a_host_that_closes(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine(token_delay_s=0.01)
    on = host(engine, budget_bytes=20)
    await work(on, folder, write_calls(folder, 0, ["echo"], 1))
    engine.load_delay_s = 10
    working = asyncio.create_task(work(on, folder, write_calls(folder, 1, ["echo"], 50), "loud"))
    async with asyncio.timeout(10):
        while not on.cache.loading:  # there is no event for it  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert on.cache.loading == {"loud"}
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await asyncio.wait_for(on.aclose(), 1)
    assert engine.tally.loads == {"echo": 1} == engine.tally.unloads and not on.cache.used_bytes


async def test_nothing_is_loaded_for_a_work_item_that_is_done_already(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine()
    units = write_calls(folder, 0, ["echo"], 3)
    await work(host(engine), folder, units)
    assert await work(host(engine), folder, units, "loud") == WorkReport() and engine.tally.loads == {"echo": 1}


async def test_units_that_are_there_already_are_left_alone(tmp_path: Path) -> None:
    folder, engine = Folder.of(str(tmp_path)), FakeEngine()
    units = [unit for part in range(2) for unit in write_calls(folder, part, ["echo"], 3)]
    await work(host(engine), folder, units[:1])
    report = await work(host(engine), folder, units)
    assert report.done == Counter(echo=3) and engine.tally.generations["echo"] == 6
    assert await work(host(engine), folder, units) == WorkReport()


async def test_a_full_disk_stops_the_work_item_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.of(str(tmp_path))
    units = [unit for part in range(9) for unit in write_calls(folder, part, ["echo"], 9)]

    def full(*arguments: object) -> None:
        raise DiskFull(tmp_path, free_bytes=0)

    monkeypatch.setattr(answering, "write_answers", full)
    with pytest.raises(DiskFull):
        await work(host(FakeEngine()), folder, units)


async def test_progress_is_reported_while_a_work_item_runs(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    units = write_calls(folder, 0, ["echo"], 30)
    reports: list[WorkReport] = []
    slow = host(FakeEngine(capacity=2, token_delay_s=0.05))
    await asyncio.wait_for(Answerer(slow, folder, 0, units, reports.append).run(), 30)
    assert len(reports) > 2 and sum(report.done["echo"] for report in reports) == 30


def test_the_errors_of_weights_are_those_that_end_an_expert() -> None:
    answerer = Answerer(host(FakeEngine()), Folder("memory://x"), 0, [], lambda report: None)
    assert answerer._is_final("echo", WeightsError("torn")) and not answerer._is_final("echo", EngineError("odd"))


def test_what_a_call_wants_is_kept_with_it(tmp_path: Path) -> None:
    folder, unit = Folder.of(str(tmp_path)), Unit(0, 0, "echo", "echo", 2)
    request = GenerateRequest(messages=(Message("user", "hi"),))
    calls = [(0, ExpertCall("0", "echo", request, wants="latent")), (1, ExpertCall("0", "echo", request))]
    _write(folder, _calls(0, 0), CALLS, [_call_record(row, call) for row, call in calls])
    assert read_calls(folder, 0, unit) == calls
