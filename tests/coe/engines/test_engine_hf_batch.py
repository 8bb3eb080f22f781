"""Which requests join a batch, how rows end, and the queue between event loop and worker."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coe.engines.answer import AnswerStream
from coe.engines.base import Adapter
from coe.engines.hf.batch import COALESCE_S, BatchRow, deliver
from coe.engines.hf.waiting import BatchLimits, WaitingRows, choose_batch
from coe.engines.parsing.text import TextStream
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind

EOS = 0


def decode(tokens: Any) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def row(
    n_prompt: int = 3,
    adapter: str | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    clock: Any = None,
    **fields: Any,
) -> BatchRow:
    request = GenerateRequest(prompt="x", **{"max_tokens": 10, **fields})
    return BatchRow(
        request=request,
        prompt_ids=[1] * n_prompt,
        adapter=Adapter(adapter_spec(adapter), Path(adapter)) if adapter else None,
        eos=frozenset({EOS}),
        text=AnswerStream(TextStream(decode, request.stop)),
        sampling=None,
        loop=loop,  # type: ignore[arg-type]
        clock=clock or time.monotonic,
    )


def adapter_spec(name: str, digest: str | None = "") -> ExpertSpec:
    digest = f"sha256:{name}" if digest == "" else digest
    return ExpertSpec(name=name, kind=Kind.ADAPTER, source=name, base="b", digest=digest)


def limits(**fields: Any) -> BatchLimits:
    return BatchLimits(**{"rows": 8, "adapters": 4, "tokens": None, "positions": 1000, **fields})


def advance(r: BatchRow, data: bytes) -> list[Any]:
    for token in data:
        r.advance(token)
    return r.drain()


# Choosing a batch


def test_rows_go_in_their_order_up_to_the_limit() -> None:
    rows = [row() for _ in range(5)]
    assert choose_batch(rows, limits(rows=3)) == rows[:3]
    assert choose_batch(rows, limits()) == rows
    assert choose_batch([], limits()) == []


def test_a_long_prompt_does_not_join_short_ones_but_the_oldest_always_goes() -> None:
    short, long = [row(20) for _ in range(3)], row(600)
    assert choose_batch([*short, long], limits()) == short
    assert choose_batch([long, *short], limits()) == [long]
    assert choose_batch([short[0], long, short[1]], limits()) == [short[0], short[1]]


def test_prompts_that_are_all_short_or_of_like_length_share_a_batch() -> None:
    mixed = [row(2), row(64), row(5)]
    assert choose_batch(mixed, limits()) == mixed
    alike = [row(200), row(300), row(250)]
    assert choose_batch(alike, limits()) == alike


def test_the_cache_and_the_context_bound_a_batch() -> None:
    rows = [row(10, max_tokens=40) for _ in range(4)]
    assert choose_batch(rows, limits(tokens=149)) == rows[:2]  # 50 tokens per row
    assert choose_batch(rows, limits(tokens=1)) == rows[:1]  # the oldest is admitted, and may run out of memory
    wide = [row(60, max_tokens=10), row(10, max_tokens=60)]
    assert choose_batch(wide, limits(positions=119)) == wide[:1]  # padded prompt and answer: 120
    assert choose_batch(wide, limits(positions=120)) == wide


def test_no_more_adapters_than_there_are_slots() -> None:
    rows = [row(adapter=a) for a in ("a", "b", "a")] + [row(), row(adapter="c")]
    assert choose_batch(rows, limits(adapters=2)) == rows[:4]


def test_adapters_are_told_apart_by_content(tmp_path: Path) -> None:
    def key(name: str, digest: str | None) -> str:
        return Adapter(adapter_spec(name, digest), tmp_path).key()

    assert key("old", "sha256:1") == key("new", "sha256:1") != key("old", "sha256:2")
    (tmp_path / "w").write_bytes(b"one")
    before = key("a", None)
    assert before == key("a", None)
    (tmp_path / "w").write_bytes(b"other")
    assert key("a", None) != before


# How a row ends


def test_an_end_token_ends_with_stop_and_counts() -> None:
    items = advance(row(n_prompt=5), b"hi" + bytes([EOS]))
    assert "".join(c.text for c in items) == "hi"
    assert items[-1] == Chunk("i", "stop", Usage(5, 3))


def test_max_tokens_ends_with_length_and_shows_all() -> None:
    r = row(max_tokens=2)
    assert advance(r, b"hi")[-1] == Chunk("i", "length", Usage(3, 2))
    assert r.done


def test_a_stop_string_ends_the_row_in_the_middle_of_the_tokens() -> None:
    r = row(stop=("lo w",))
    for token in b"hello w":
        assert not r.done
        r.advance(token)
    assert r.done
    items = r.drain()
    assert "".join(c.text for c in items) == "hel"
    assert (items[-1].finish_reason, items[-1].usage) == ("stop", Usage(3, 7))


def test_a_stop_string_that_does_not_come_is_shown_in_the_end() -> None:
    items = advance(row(stop=("hill",)), b"hi" + bytes([EOS]))
    assert "".join(c.text for c in items) == "hi"


def test_a_cancelled_row_ends_at_its_next_token() -> None:
    r = row()
    r.advance(ord("a"))
    r.cancelled = True
    r.advance(ord("b"))
    assert r.done
    assert r.drain()[-1].finish_reason == "cancelled"


def test_text_after_the_first_is_handed_out_in_larger_pieces() -> None:
    now = [0.0]
    r = row(clock=lambda: now[0])
    assert [c.text for c in advance(r, b"abc")] == ["a"]
    now[0] += COALESCE_S
    assert [c.text for c in advance(r, b"de")] == ["bcd"]
    assert [c.text for c in advance(r, bytes([EOS]))] == ["e"]


def test_a_row_fails_once() -> None:
    r, error = row(), ValueError("first")
    r.fail(error)
    r.fail(ValueError("second"))
    assert r.drain() == [error]


async def test_what_is_ready_reaches_each_rows_queue() -> None:
    loop = asyncio.get_running_loop()
    first, second, silent = row(loop=loop), row(loop=loop), row(loop=loop)
    first.advance(ord("a"))
    second.fail(ValueError("no"))
    await asyncio.to_thread(deliver, [first, second, silent])
    assert await first.queue.get() == Chunk("a")
    assert isinstance(await second.queue.get(), ValueError)
    assert silent.queue.empty()


def test_a_row_whose_event_loop_is_gone_is_cancelled() -> None:
    loop = asyncio.new_event_loop()
    r = row(loop=loop)
    loop.close()
    r.advance(ord("a"))
    deliver([r])
    assert r.cancelled


# The queue


def test_rows_that_come_together_run_together() -> None:
    queue, rows = WaitingRows(n_full=8, gather_s=0.2), [row() for _ in range(3)]
    taken: list[list[BatchRow]] = []
    worker = threading.Thread(target=lambda: taken.append(queue.take(limits)))
    worker.start()
    for r in rows:
        assert queue.put(r)
    worker.join()
    assert taken == [rows]


def test_a_batch_waits_for_rows_on_their_way_and_a_full_one_does_not_wait() -> None:
    queue, first, second = WaitingRows(n_full=2, gather_s=0.001, gather_at_most_s=60), row(), row()
    with queue.expecting():
        queue.put(first)
        taken: list[list[BatchRow]] = []
        worker = threading.Thread(target=lambda: taken.append(queue.take(limits)))
        worker.start()
        worker.join(0.05)
        assert worker.is_alive()
        queue.put(second)
        worker.join(30)
    assert taken == [[first, second]]


def test_what_never_comes_holds_a_batch_only_for_a_while() -> None:
    queue, only = WaitingRows(n_full=2, gather_s=0.001, gather_at_most_s=0.02), row()
    with queue.expecting():
        queue.put(only)
        assert queue.take(limits) == [only]


def test_a_closed_queue_gives_what_it_has_and_takes_no_more() -> None:
    queue, last, cancelled = WaitingRows(n_full=2), row(), row()
    queue.put(last)
    queue.put(cancelled)
    cancelled.cancelled = True
    queue.close()
    assert not queue.put(row())
    assert queue.take(limits) == [last]
    assert queue.take(limits) == []


@pytest.mark.parametrize("n", [1, 3])
def test_what_does_not_fit_waits_for_the_next_batch(n: int) -> None:
    queue, rows = WaitingRows(n_full=n, gather_s=0.001), [row() for _ in range(n + 1)]
    for r in rows:
        queue.put(r)
    assert queue.take(lambda: limits(rows=n)) == rows[:n]
    assert queue.take(lambda: limits(rows=n)) == rows[n:]
