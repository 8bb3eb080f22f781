"""Renders of one template that wait share an exchange with the process; limits and failures stay those of each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_models import model_spec, say

from coe.engines import render_worker
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.waiting import WaitingRows
from coe.engines.hf.worker import BatchWorker
from coe.engines.render import Renderer, RenderLimits
from coe.engines.render_process import RenderProcess
from coe.errors import EngineError, Rejected, TemplateError
from coe.types import GenerateRequest
from routers.base import Message

ECHO = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
COUNTS = "{% for i in range(messages[0].content | int) %}{% for j in range(99999) %}{% endfor %}{% endfor %}done"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SLOW_IF_LONG = "{% if messages | length > 1 %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
LARGE_IF_LONG = "{% if messages | length > 1 %}{{ [0] * 10 ** 10 }}{% endif %}{{ messages[0].content }}"
LONG = {"messages": [{"role": "user", "content": "x" * 40_000} for _ in range(2)]}
"""Too long to blame the template: the others are rendered all the same."""


def said(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of renders in each exchange."""
    found: list[int] = []
    ask = RenderProcess.ask

    def counted(self: RenderProcess, template: str, renders: Sequence[bytes]) -> Iterator[dict[str, str]]:
        found.append(len(renders))
        yield from ask(self, template, renders)

    monkeypatch.setattr(RenderProcess, "ask", counted)
    return found


Make = Callable[..., Renderer]


@pytest.fixture
def make() -> Iterator[Make]:
    """Renderers with one process each; closed at the end."""
    made: list[Renderer] = []

    def renderer(**limits: Any) -> Renderer:
        made.append(Renderer(RenderLimits(**limits), most_processes=1))
        return made[-1]

    yield renderer
    for each in made:
        each.close()


@contextmanager
def standing(renderer: Renderer, sizes: list[int]) -> Iterator[None]:
    """The process of the renderer stands still, with a render; `sizes` are those of the exchanges after it."""
    assert renderer.submit("x", said(""), expert="e").result(30) == "x"
    [worker] = renderer._queue._workers
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGSTOP)
    renderer.submit("first", said(""), expert="e")
    while "first" not in renderer._queue._running:
        time.sleep(0.001)
    yield
    sizes.clear()
    with suppress(ProcessLookupError):
        os.kill(worker._process.pid, signal.SIGCONT)


def burst(renderer: Renderer, template: str, contents: Sequence[str]) -> list[Future[str]]:
    return [renderer.submit(template, said(content), expert="e") for content in contents]


def test_a_burst_is_one_exchange_and_each_reader_has_its_own_text(make: Make, sizes: list[int]) -> None:
    contents = [f"question {i}\nline" for i in range(32)]
    renderer = make()
    with standing(renderer, sizes):
        texts = burst(renderer, ECHO, contents)
    assert [text.result(30) for text in texts] == contents and sizes == [32]


def test_an_exchange_is_bounded_in_number(make: Make, sizes: list[int]) -> None:
    for most, expected in ((7, [7]), (6, [6, 1]), (3, [3, 3, 1])):
        renderer = make(together=most)
        with standing(renderer, sizes):
            texts = burst(renderer, ECHO, [str(i) for i in range(7)])
        assert [text.result(30) for text in texts] == [str(i) for i in range(7)] and sizes == expected


def test_an_exchange_is_bounded_in_bytes_and_one_render_may_be_larger_alone(make: Make, sizes: list[int]) -> None:
    render = json.dumps({"variables": said("a" * 1000), "most_characters": 2**17 + 512 + 2 * 1000})
    for most, expected in ((2 * len(render), [2]), (2 * len(render) - 1, [1, 1]), (10, [1, 1])):
        renderer = make(together_bytes=most)
        with standing(renderer, sizes):
            texts = burst(renderer, ECHO, ["a" * 1000, "b" * 1000])
        assert [text.result(30) for text in texts] == ["a" * 1000, "b" * 1000] and sizes == expected


def test_failures_are_of_their_own_conversation(make: Make, sizes: list[int]) -> None:
    renderer = make()
    with standing(renderer, sizes):
        texts = burst(renderer, ECHO, ["a", "no", "b", "no", "c"])
        broken = burst(renderer, "{% if %}", ["a", "b"])
    assert [texts[i].result(30) for i in (0, 2, 4)] == ["a", "b", "c"]
    for i in (1, 3):
        with pytest.raises(Rejected, match="rejects these messages: no"):
            texts[i].result(30)
    for text in broken:
        with pytest.raises(TemplateError, match="is broken"):
            text.result(30)
    assert sizes == [5, 2]


def test_a_conversation_that_takes_too_long_fails_alone(make: Make, sizes: list[int]) -> None:
    renderer = make(cpu_s=0.3)
    with standing(renderer, sizes):
        texts = burst(renderer, SLOW_IF_LONG, ["a", "b"])
        hostile = renderer.submit(SLOW_IF_LONG, LONG, expert="e")
        texts += burst(renderer, SLOW_IF_LONG, ["c", "d"])
    assert [text.result(30) for text in texts] == ["a", "b", "c", "d"]
    with pytest.raises(TemplateError, match=r"takes more than 0.3 s of CPU time$"):
        hostile.result(30)
    assert sizes == [5, 2], "those behind it go on together"


def test_a_conversation_that_takes_all_memory_fails_alone(make: Make, sizes: list[int]) -> None:
    renderer = make()
    with standing(renderer, sizes):
        texts = burst(renderer, LARGE_IF_LONG, ["a"])
        hostile = renderer.submit(LARGE_IF_LONG, LONG, expert="e")
        texts += burst(renderer, LARGE_IF_LONG, ["b", "c"])
    assert [text.result(30) for text in texts] == ["a", "b", "c"]
    with pytest.raises(TemplateError, match="takes too much memory"):
        hostile.result(30)
    assert sizes == [4, 1], "it has an exchange of its own before it fails"


def test_a_conversation_that_ends_the_process_fails_alone(make: Make, sizes: list[int]) -> None:
    renderer = make(cpu_s=600.0)
    with standing(renderer, sizes):
        hostile = renderer.submit(SLOW_IF_LONG, LONG, expert="e")
        texts = burst(renderer, SLOW_IF_LONG, ["a", "b"])
    [worker] = renderer._queue._workers
    for expected in ([3], [3, 1]):
        while sizes != expected or worker._process is None or worker._process.poll() is not None:
            time.sleep(0.001)
        os.kill(worker._process.pid, signal.SIGKILL)
    assert [text.result(30) for text in texts] == ["a", "b"] and sizes == [3, 1, 2]
    with pytest.raises(TemplateError, match=r"ends the process that renders it \(exit code -9\)"):
        hostile.result(30)


def test_the_limit_of_cpu_time_is_of_each_render(make: Make, sizes: list[int]) -> None:
    began = time.process_time()
    assert render_worker.answer(COUNTS, {"variables": said("20"), "most_characters": 10}) == {"text": "done"}
    one_s = time.process_time() - began
    renderer = make(cpu_s=4 * one_s, together_s=600.0)
    with standing(renderer, sizes):
        texts = burst(renderer, COUNTS, ["20"] * 8)
    assert [text.result(60) for text in texts] == ["done"] * 8 and sizes == [8]


def test_no_render_starts_late_in_an_exchange_or_without_a_reader(make: Make, sizes: list[int]) -> None:
    renderer = make(together_s=0.0)
    with standing(renderer, sizes):
        texts = burst(renderer, ECHO, ["a", "b", "c"])
        texts[1].cancel()
    assert [texts[i].result(30) for i in (0, 2)] == ["a", "c"]
    assert sizes == [2, 1]


def test_a_text_does_not_wait_for_the_renders_behind_it(make: Make, sizes: list[int]) -> None:
    renderer = make(cpu_s=2.0)
    with standing(renderer, sizes):
        [quick] = burst(renderer, SLOW_IF_LONG, ["quick"])
        slow = renderer.submit(SLOW_IF_LONG, LONG, expert="e")
    assert quick.result(30) == "quick" and not slow.done()


def test_templates_take_turns(make: Make, sizes: list[int]) -> None:
    renderer = make(together=2)
    with standing(renderer, sizes):
        texts = burst(renderer, ECHO, list("abcd"))
        ended: list[str] = []
        texts[-1].add_done_callback(lambda _: ended.append("many"))
        other = renderer.submit("other", said(""), expert="f")
        other.add_done_callback(lambda _: ended.append("other"))
    assert [text.result(30) for text in texts] == list("abcd") and other.result(30) == "other"
    assert ended == ["other", "many"] and sizes == [2, 1, 2]


def test_closing_ends_every_wait(make: Make, sizes: list[int]) -> None:
    renderer = make()
    with standing(renderer, sizes):
        texts = burst(renderer, ECHO, list("abc"))
        renderer.close()
        for text in texts:
            with pytest.raises(EngineError, match="'e' was unloaded"):
                text.result(30)


async def test_a_burst_of_requests_is_one_batch_of_the_engine_without_the_one_that_fails(
    tiny: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    run = BatchWorker._run

    def counted(self: BatchWorker, rows: Sequence[BatchRow]) -> None:
        batches.append(len(rows))
        run(self, rows)

    monkeypatch.setattr(BatchWorker, "_run", counted)
    patient = partial(WaitingRows, gather_at_most_s=60.0)  # however slow this machine is
    monkeypatch.setattr("coe.engines.hf.expert.WaitingRows", patient)
    engine = HFEngine(device="cpu", dtype="float32")
    expert = await engine.load(model_spec(tiny), tiny)
    expert.loaded.tokenizer.chat_template = ECHO
    engine._renderer._queue._most = 1  # no second process takes the first of the burst
    with standing(engine._renderer, sizes):
        requests = [GenerateRequest(messages=(Message("user", f"the end {i}"),), max_tokens=2) for i in range(31)]
        requests.insert(7, GenerateRequest(messages=(Message("user", "no"),), max_tokens=2))
        answers = [asyncio.create_task(say(expert, request)) for request in requests]
        async with asyncio.timeout(60):
            while sum(map(len, engine._renderer._queue._jobs.values())) < 32:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    refused = (await asyncio.gather(*answers, return_exceptions=True))[7]
    assert isinstance(refused, Rejected) and sizes == [32] and batches == [31]
    await engine.unload(expert)
