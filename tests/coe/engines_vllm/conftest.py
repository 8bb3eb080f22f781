"""One engine process for all tests that need vLLM, in one event loop; the hf engine beside it, for comparison."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from engine_models import adapter_spec, make_tokenizer, save_adapter, save_tiny_model

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.vllm.engine import VLLMEngine
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.slot import VLLMSlot
from registry.digest import digest_of_text
from registry.spec import ExpertSpec, Kind


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines of the whole session keep their files here."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("COE_HOME", str(home))
        yield home


OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_bytes": 32 * 2**20,
    "max_num_seqs": 16,
    "max_loras": 2,
    "max_cpu_loras": 3,
    "max_lora_rank": 8,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, whose heads are as wide as vLLM's kernels need."""
    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    return save_tiny_model(folder, tokenizer, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="session")
def adapters(tiny: Path) -> list[Adapter]:
    folders = [save_adapter(tiny.parent / ("a" * (i + 1)), tiny) for i in range(4)]
    return [Adapter(adapter_spec(f, digest=digest_of_text("test", str(f))), f) for f in folders]


@pytest.fixture(scope="session")
def spec(tiny: Path) -> ExpertSpec:
    return ExpertSpec(
        name="tiny", kind=Kind.MODEL, source=str(tiny), digest=digest_of_text("test", "tiny"), size_bytes=1
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def slot(spec: ExpertSpec) -> AsyncIterator[VLLMSlot]:
    engine = VLLMEngine(**OPTIONS)
    slot = await engine.open_slot(engine.shape(spec))
    yield slot
    await slot.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def expert(spec: ExpertSpec, tiny: Path, slot: VLLMSlot) -> VLLMExpert:
    return slot.expert or await slot.switch(spec, tiny)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hf(spec: ExpertSpec, tiny: Path) -> AsyncIterator[HFExpert]:
    engine = HFEngine(device="cpu", dtype="float32")
    expert = await engine.load(spec, tiny)
    yield expert
    await engine.unload(expert)
