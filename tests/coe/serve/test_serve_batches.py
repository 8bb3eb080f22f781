"""`/v1/batches` with the official client, over a gateway with fake experts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
from batch_runs import openai_row
from batch_service import ThreadWorker, batching, create, ended, lines, read, until, upload

from coe.config import BatchesConfig, Config, DecisionLogConfig, HostPoolConfig, PolicyConfig, ServeConfig
from coe.protocol.batches import ParsedBatch
from coe.serve.batches.link import ChildProcess
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.gateway import Gateway
from coe.serve.http.keyring import OPEN
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


def rows(count: int, model: str = "echo") -> bytes:
    return lines(*(openai_row(f"r{i:03d}", f"hello {i}", model) for i in range(count)))


def text_of(line: dict) -> str:  # type: ignore[type-arg]
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


async def test_a_batch_goes_from_its_file_to_its_results(tmp_path: Path) -> None:
    content = lines(
        openai_row("a", "hello", "auto"),
        openai_row("b", "hello", "echo"),
        openai_row("c", "hello", "coe/safe"),
        openai_row("d", "hello", "broken"),
        openai_row("e", "hello", "nobody"),
        openai_row("f", "hello", "echo", temperature=9),
    )
    async with batching(tmp_path) as there:
        file_id = await upload(there, content)
        made = await create(there, file_id, metadata={"night": "1"})
        assert (made.status, made.object, made.completion_window) == ("validating", "batch", "24h")
        assert made.expires_at == made.created_at + 86_400
        batch = await ended(there, made.id)
        assert batch.status == "completed" and batch.errors is None and batch.metadata == {"night": "1"}
        counts = batch.request_counts
        assert counts is not None and (counts.total, counts.completed, counts.failed) == (6, 3, 3)
        assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
        good, bad = await read(there, batch.output_file_id), await read(there, batch.error_file_id)
        assert {name: text_of(line) for name, line in good.items()} == {"a": "HELLO", "b": "hello", "c": "hello"}
        assert batch.usage is not None
        used = [line["response"]["body"]["usage"] for line in good.values()]
        assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in used) > 0
        codes = {
            name: (each["response"]["status_code"], each["response"]["body"]["error"]["code"])
            for name, each in bad.items()
        }
        assert codes == {"d": (500, "engine_error"), "e": (404, "model_not_found"), "f": (400, "invalid_value")}
        results = await there.client.files.list(purpose="batch_output")
        assert {each.id for each in results.data} == {batch.output_file_id, batch.error_file_id}
        listed = [each.id async for each in there.client.batches.list(limit=1)]
        assert listed == [batch.id]


async def test_a_batch_of_completions(tmp_path: Path) -> None:
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "upper", "prompt": "once"}}
    async with batching(tmp_path) as there:
        batch = await ended(
            there, (await create(there, await upload(there, lines(row)), endpoint="/v1/completions")).id
        )
        [line] = (await read(there, batch.output_file_id)).values()
        assert line["response"]["body"]["choices"][0]["text"] == "ONCE" and batch.error_file_id is None


async def test_the_child_is_a_process_that_holds_no_weights(tmp_path: Path) -> None:
    """As in a service: the answers come from the hosts of the gateway."""
    async with batching(tmp_path, start=ChildProcess.start) as there:
        batch = await ended(there, (await create(there, await upload(there, rows(3)))).id)
        assert batch.status == "completed" and len(await read(there, batch.output_file_id)) == 3
        assert there.host.loads.total() == 1
        await until(lambda: not (tmp_path / "batches" / batch.id / "run").exists())


async def test_each_expert_is_loaded_once_though_memory_has_room_for_one(tmp_path: Path) -> None:
    mixed = lines(*(openai_row(f"r{i}", "hello", ("echo", "upper")[i % 2]) for i in range(40)))
    async with batching(tmp_path, budget_bytes=100) as there:
        before = there.host.loads.total()
        batch = await ended(there, (await create(there, await upload(there, mixed))).id)
        assert batch.request_counts is not None and batch.request_counts.completed == 40
        assert there.host.loads.total() - before == 2


async def test_counts_move_while_it_runs(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.02, given={"in_flight": 2}) as there:
        made = await create(there, await upload(there, rows(60)))
        seen = set()
        while (batch := await there.client.batches.retrieve(made.id)).status in ("validating", "in_progress"):
            assert batch.request_counts is not None
            seen.add(batch.request_counts.completed)
            await asyncio.sleep(0.05)
        assert len(seen) > 2 and max(seen) <= 60
        assert (await ended(there, made.id)).status == "completed"


async def test_no_more_calls_are_in_flight_than_stated_and_fewer_beside_other_requests(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.01, given={"in_flight": 8}) as there:
        most = []
        ask = there.host.ask
        flying = 0

        async def counted(*args):  # type: ignore[no-untyped-def]
            nonlocal flying
            flying += 1
            most.append((there.service.in_flight, flying))
            try:
                async for chunk in ask(*args):
                    yield chunk
            finally:
                flying -= 1

        object.__setattr__(there.service.batches._environment, "ask", counted)  # type: ignore[union-attr]
        made = await create(there, await upload(there, rows(120)))
        await until(lambda: len(most) > 20)
        there.service.in_flight += 1
        marked = len(most)
        await until(lambda: len(most) > marked + 40)
        there.service.in_flight -= 1
        await ended(there, made.id)
        assert max(n for busy, n in most if not busy) == 8
        assert max(n for busy, n in most[marked + 10 : marked + 40] if busy) == 2


async def test_cancelling_keeps_what_is_answered(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.2, given={"in_flight": 2}) as there:
        made = await create(there, await upload(there, rows(800)))
        while (now := await there.client.batches.retrieve(made.id)).request_counts.completed < 4:  # type: ignore[union-attr]
            assert now.status in ("validating", "in_progress")
            await asyncio.sleep(0.02)
        assert (await there.client.batches.cancel(made.id)).status == "cancelling"
        batch = await ended(there, made.id)
        assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
        good, bad = await read(there, batch.output_file_id), await read(there, batch.error_file_id)
        assert len(good) >= 4 and len(good) + len(bad) == 800
        assert all(line["response"] is None for line in bad.values())
        assert {line["error"]["code"] for line in bad.values()} == {"batch_cancelled"}
        assert (await there.client.batches.cancel(made.id)).status == "cancelled"


async def test_a_batch_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.05, given={"in_flight": 1}) as there:
        file_id = await upload(there, rows(40))
        first, second = await create(there, file_id), await create(there, file_id)
        await there.client.batches.cancel(second.id)
        assert (await there.client.batches.retrieve(second.id)).status == "cancelling"
        await there.client.batches.cancel(first.id)
        assert (await ended(there, second.id)).status == "cancelled"
        assert (await there.client.batches.retrieve(second.id)).output_file_id is None


async def test_what_is_not_answered_in_time_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.serve.batches.records.WINDOW_S", 1)
    async with batching(tmp_path, token_delay_s=0.1, given={"in_flight": 1}) as there:
        batch = await ended(there, (await create(there, await upload(there, rows(300)))).id)
        bad = await read(there, batch.error_file_id)
        assert batch.status == "expired" and {line["error"]["code"] for line in bad.values()} == {"batch_expired"}


async def test_a_restart_in_the_middle_goes_on_and_answers_no_row_twice(tmp_path: Path) -> None:
    """By expert: what is answered is written, and not asked again."""
    mixed = lines(*(openai_row(f"r{i:03d}", f"hello {i}", ("echo", "upper")[i % 2]) for i in range(80)))
    async with batching(tmp_path, token_delay_s=0.02, given={"in_flight": 8}) as there:
        made = await create(there, await upload(there, mixed))
        run = tmp_path / "batches" / made.id / "run" / "parts" / "answers"
        await until(lambda: bool(list(run.glob("*/*/*.parquet"))))
        assert (await there.client.batches.retrieve(made.id)).status == "in_progress"
    answered = len(list(run.glob("*/*/*.parquet")))
    async with batching(tmp_path) as there:
        asked = []
        ask = there.host.ask

        async def counted(name, request):  # type: ignore[no-untyped-def]
            asked.append(name)
            async for chunk in ask(name, request):
                yield chunk

        object.__setattr__(there.service.batches._environment, "ask", counted)  # type: ignore[union-attr]
        batch = await ended(there, made.id)
        good = await read(there, batch.output_file_id)
        assert batch.status == "completed" and answered and len(good) == 80
        assert len(asked) < 80


async def test_a_child_that_dies_is_replaced(tmp_path: Path) -> None:
    started = []

    class Dying(ThreadWorker):
        async def receive(self) -> None:
            return None

    async def start() -> ThreadWorker:
        started.append(ThreadWorker() if started else Dying())
        return started[-1]

    async with batching(tmp_path, start=start) as there:
        batch = await ended(there, (await create(there, await upload(there, rows(3)))).id)
        assert batch.status == "completed" and len(started) == 2


async def test_two_services_on_one_folder_run_a_batch_once(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.01) as one, batching(tmp_path, token_delay_s=0.01) as two:
        file_id = await upload(one, rows(30))
        made = [await create(there, file_id) for there in (one, two, one)]
        for each in made:
            batch = await ended(two, each.id)
            assert batch.status == "completed" and len(await read(one, batch.output_file_id)) == 30
        calls = sum(host.loads.total() for host in (one.host, two.host))
        assert calls in (1, 2)
        assert len((await two.client.files.list(purpose="batch_output")).data) == 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\n\n", [("empty_file", None)]),
        (b"{no json\n", [("invalid_json_line", 1)]),
        (b"[1]\n", [("invalid_json_line", 1)]),
        (b"\xff\xfe\n", [("invalid_json_line", 1)]),
        (b"[" * 2000 + b"\n", [("invalid_json_line", 1)]),
        (lines(openai_row("a", "x"), openai_row("a", "y")), [("duplicate_custom_id", 2)]),
        (lines({**openai_row("a", "x"), "method": "GET"}), [("invalid_method", 1)]),
        (lines({**openai_row("a", "x"), "url": "/v1/completions"}), [("mismatched_endpoint", 1)]),
        (lines({**openai_row("a", "x"), "body": []}), [("invalid_body", 1)]),
        (lines({**openai_row("a", "x"), "more": 1}), [("unknown_field", 1)]),
        (lines({"prompt": "x"}), [("unknown_field", 1), ("invalid_custom_id", 1), ("invalid_method", 1)]),
        (lines(openai_row("a", "x"), openai_row("b", "y" * 3000), openai_row("c", "x")), [("line_too_long", 2)]),
        (lines(*(openai_row(str(i), "x") for i in range(6))), [("too_many_requests", 6)]),
    ],
)
async def test_a_wrong_input_file_fails_the_batch_with_its_lines(
    tmp_path: Path, content: bytes, found: list[tuple[str, int | None]]
) -> None:
    settings = {"max_body_bytes": 2048}
    async with batching(tmp_path, given={"max_rows": 5}, settings=settings) as there:
        batch = await ended(there, (await create(there, await upload(there, content))).id)
        assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
        assert batch.errors is not None and batch.errors.data is not None
        assert [(each.code, each.line) for each in batch.errors.data][: len(found)] == found


async def test_what_a_batch_cannot_be_is_refused(tmp_path: Path) -> None:
    async with batching(tmp_path, given={"max_waiting": 1}, token_delay_s=0.5) as there:
        with pytest.raises(openai.NotFoundError, match="no file"):
            await create(there, "file-" + "0" * 24)
        file_id = await upload(there, rows(1))
        for wrong in ({"endpoint": "/v1/embeddings"}, {"completion_window": "1h"}, {"metadata": {"a" * 65: "b"}}):
            with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
                await create(there, file_id, **wrong)
        made = await create(there, file_id)
        with pytest.raises(openai.RateLimitError, match="max_waiting"):
            await create(there, file_id)
        for batch_id in ("batch_" + "0" * 24, "nothing", made.id.upper()):
            with pytest.raises(openai.NotFoundError):
                await there.client.batches.retrieve(batch_id)
        await ended(there, made.id)


async def test_the_input_file_of_a_batch_stays_until_it_has_ended(tmp_path: Path) -> None:
    async with batching(tmp_path, token_delay_s=0.2) as there:
        file_id = await upload(there, rows(2))
        made = await create(there, file_id)
        with pytest.raises(openai.ConflictError, match="a batch reads"):
            await there.client.files.delete(file_id)
        assert (await ended(there, made.id)).status == "completed"
        assert (await there.client.files.delete(file_id)).deleted


async def test_internal_errors_have_no_details_in_the_results(tmp_path: Path) -> None:
    async with batching(tmp_path) as there:
        batch = await ended(there, (await create(there, await upload(there, rows(1, "unloadable")))).id)
        [line] = (await read(there, batch.error_file_id)).values()
        assert "/nowhere" not in str(line) and line["response"]["status_code"] >= 500


async def test_a_gateway_of_a_service_runs_batches_from_its_first_catalog_on(tmp_path: Path) -> None:
    """The policies and experts are those of the catalog; without the setting there are none."""
    pools, log = (HostPoolConfig(experts=("echo",)),), DecisionLogConfig(folder=None)
    expert = ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo")
    catalog = Catalog(1, Snapshot(3, {"echo": expert}), {"default": PolicyConfig(expert="echo")}, "default")
    settings = ServeConfig(pools=pools, log=log, batches=BatchesConfig(folder=tmp_path))
    served = Gateway(Config(serve=settings), {})
    batches = served._batches
    assert batches is not None and served._service.batches is batches
    await served.reconfigure(catalog.to_json())
    assert batches._now().policies.keys() == {"default"} and "echo" in batches._now().snapshot
    stored = await batches.upload()
    stored.write(lines({"no": "request"}))
    file = await batches.commit(OPEN, stored, "in.jsonl", "batch", None)
    made = await batches.create(OPEN, ParsedBatch(file["id"], "/v1/chat/completions", None, None))
    async with asyncio.timeout(100):
        while (batch := await batches.batch(OPEN, made["id"]))["status"] != "failed":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert batch["errors"]["data"][0]["line"] == 1
    await batches.close()
    served._service.close()
    off = Gateway(Config(serve=ServeConfig(pools=pools, log=log)), {})
    assert off._service.batches is None
    off._service.close()
