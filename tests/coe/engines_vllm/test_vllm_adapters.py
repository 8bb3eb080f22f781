"""Adapters in a vLLM engine: ids, the bound on their number, and failures; vLLM is not needed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_models import adapter_spec, make_tokenizer, save_adapter, save_tiny_model

from coe.engines.base import Adapter
from coe.engines.vllm.adapters import AdapterChecks, Adapters
from coe.errors import WeightsError


@dataclass(frozen=True)
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Keeps the adapters that are in it, as vLLM does. A call to a process that died never returns."""

    errored = False
    dead_error = RuntimeError("the engine is dead")

    def __init__(self) -> None:
        self.there: dict[int, str] = {}
        self.seen: list[int] = []
        self.failure: Exception | None = None

    async def add_lora(self, request: Request) -> bool:
        await asyncio.sleep(3600 if self.errored else 0)
        if self.failure:
            raise self.failure
        self.there[request.lora_int_id] = request.lora_name
        self.seen.append(request.lora_int_id)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self.there.pop(lora_id, None) is not None


def adapter(name: str, digest: str) -> Adapter:
    return Adapter(adapter_spec(Path("/a") / name, digest=digest), Path("/a") / name)


def checked(_: Adapter) -> None: ...


async def test_an_id_is_of_one_content_and_is_never_used_again() -> None:
    llm = LLM()
    adapters = Adapters(llm, 1, checked, Request)
    ids = []
    for digest in ("x" * 64, "x" * 64, "y" * 64, "x" * 64):
        async with adapters.lease(adapter("same-name", digest)) as request:
            ids.append(request.lora_int_id)
            assert set(llm.there) == {request.lora_int_id}
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3 and ids[1] < ids[2] < ids[3]
    again = Adapters(LLM(), 1, checked, Request)  # of an engine that was started again
    async with again.lease(adapter("same-name", "x" * 64)) as request:
        assert request.lora_int_id > ids[3]


async def test_one_in_use_is_not_removed_and_the_next_waits_for_room() -> None:
    llm = LLM()
    adapters = Adapters(llm, 2, checked, Request)
    async with AsyncExitStack() as held:
        one = await held.enter_async_context(adapters.lease(adapter("one", "1" * 64)))
        async with adapters.lease(adapter("two", "2" * 64)):
            pass
        third = asyncio.ensure_future(held.enter_async_context(adapters.lease(adapter("three", "3" * 64))))
        request = await third
        assert set(llm.there) == {one.lora_int_id, request.lora_int_id}
        async with asyncio.timeout(5):
            fourth = adapters.lease(adapter("four", "4" * 64))
            entering = asyncio.ensure_future(fourth.__aenter__())
            await asyncio.sleep(0.05)
            assert not entering.done() and len(llm.there) == 2
            await held.aclose()
            await entering
            await fourth.__aexit__(None, None, None)
    assert len(llm.there) == 2


async def test_many_requests_for_one_adapter_add_it_once() -> None:
    llm = LLM()
    adapters = Adapters(llm, 4, checked, Request)

    async def use() -> None:
        async with adapters.lease(adapter("a", "a" * 64)):
            await asyncio.sleep(0)

    await asyncio.gather(*(use() for _ in range(20)))
    assert len(llm.seen) == 1


async def test_one_that_vllm_refuses_fails_alone_and_takes_no_room() -> None:
    llm = LLM()
    adapters = Adapters(llm, 1, checked, Request)
    llm.failure = Exception("Call to add_lora method failed: broken")
    with pytest.raises(WeightsError, match="cannot be loaded by vLLM: .*broken"):
        async with adapters.lease(adapter("bad", "b" * 64)):
            pass
    llm.failure = None
    async with adapters.lease(adapter("good", "c" * 64)):
        assert len(llm.there) == 1


async def test_an_engine_that_dies_while_an_adapter_is_added_holds_no_request() -> None:
    llm = LLM()
    adapters = Adapters(llm, 1, checked, Request)

    async def use(name: str) -> None:
        async with adapters.lease(adapter(name, name * 64)):
            pass

    llm.errored = True
    async with asyncio.timeout(5):
        failed = await asyncio.gather(use("a"), use("b"), return_exceptions=True)
    assert all(isinstance(each, Exception) for each in failed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "tiny", make_tokenizer())


def check(base: Path, folder: Path, max_rank: int = 8) -> None:
    AdapterChecks("tiny", base, max_rank).check(Adapter(adapter_spec(folder), folder))


def test_an_adapter_that_fits_passes_the_check(base: Path, tmp_path: Path) -> None:
    check(base, save_adapter(tmp_path / "fits", base))


def test_what_does_not_fit_or_vllm_lacks_is_refused_before_vllm_sees_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="rank is 16, more than engines.vllm.max_lora_rank = 8"):
        check(base, save_adapter(tmp_path / "high", base, r=16))
    with pytest.raises(WeightsError, match="DoRA"):
        check(base, save_adapter(tmp_path / "dora", base, use_dora=True))
    broken = save_adapter(tmp_path / "broken", base)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="'broken' cannot be loaded"):
        check(base, broken)
    with pytest.raises(WeightsError, match="'gone' cannot be loaded"):
        check(base, tmp_path / "gone")
    other = save_tiny_model(tmp_path / "other", make_tokenizer(), hidden_size=64)
    with pytest.raises(WeightsError, match="does not fit its base"):
        check(base, save_adapter(tmp_path / "of-other", other))
