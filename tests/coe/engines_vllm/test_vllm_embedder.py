"""Embedding models on vLLM: the vectors of the hf engine, refusals, and a process that dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_models import save_tiny_embedder

from coe.engines.embedding import read_vectors
from coe.engines.hf.engine import HFEngine
from coe.engines.supervision.core import EngineLost
from coe.engines.vllm.embedder import Pooling, VLLMEmbedder, pooling_of
from coe.engines.vllm.engine import VLLMEngine
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import set_environment
from coe.errors import Rejected, WeightsError
from coe.host import Host
from coe.types import GenerateRequest
from registry.describe import describe
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

TEXTS = ("the capital of france is paris", "the end", "paris", "of", "the capital of the end is the capital of paris")
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 32 * 2**20, "max_num_seqs": 4}


def spec(folder: Path) -> ExpertSpec:
    return describe(ExpertSpec(name="vectors", kind=Kind.EMBEDDING, source=str(folder)).stated())


def request(*inputs: str | tuple[int, ...]) -> GenerateRequest:
    return GenerateRequest(prompt="", inputs=inputs, wants="embedding", stream=False)


def test_a_model_that_returns_vectors_shares_its_slot_with_no_other() -> None:
    engine = VLLMEngine(kv_cache_bytes=5)
    known = ExpertSpec(name="v", kind=Kind.EMBEDDING, source="/x", architecture="BertModel", size_bytes=1, version=3)
    shape = engine.shape(known)
    assert (shape.expert, shape.max_adapters) == ("v@3", 0) and engine.slot_bytes(shape) >= 5
    assert shape != engine.shape(known.model_copy(update={"version": 4}))


def test_its_options_have_vllms_pooling_and_no_adapters() -> None:
    options = Options(max_loras=4).for_embeddings()
    arguments = options.arguments(Path("/x"), "v", on_cpu=True, with_ray=False)
    assert arguments["runner"] == "pooling" and "enable_lora" not in arguments and options.canary == "off"
    assert "runner" not in Options().arguments(Path("/x"), "v", on_cpu=True, with_ray=False)


@pytest.mark.parametrize(
    ("pooling", "way"), [("mean", ("MEAN", True)), ("cls", ("CLS", True)), ("last", ("LAST", True))]
)
def test_pooling_in_vllms_words(tmp_path: Path, pooling: str, way: tuple[str, bool]) -> None:
    folder = save_tiny_embedder(tmp_path / "m", pooling=pooling)
    assert pooling_of("v", folder) == way
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))  # its newer form
    assert pooling_of("v", folder) == ("LAST", True)


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_mean_sqrt_len_tokens": True},  # which vLLM would read as the mean
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": ["mean", "max"]},
    ],
)
def test_pooling_that_vllm_does_not_have_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="pooling by mean.*register it with `engine: hf`"):
        pooling_of("v", folder)


def test_projections_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_embedder(tmp_path / "m", normalize=False)
    assert pooling_of("v", folder) == ("MEAN", False)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        pooling_of("v", folder)
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"projections \(Dense\), which engine 'vllm' does not serve"):
        pooling_of("v", folder)


@pytest.mark.vllm
@pytest.mark.integration
@pytest.mark.asyncio(loop_scope="session")
async def test_vectors_equal_those_of_the_hf_engine_through_the_host(tmp_path: Path) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    known, theirs = spec(folder), {}
    for name, engine in (("hf", HFEngine(device="cpu")), ("vllm", VLLMEngine(**OPTIONS))):
        snapshot = Snapshot(1, {"vectors": known.model_copy(update={"engine": name})})
        host = Host(snapshot, {name: engine}, budget_bytes=2**33, locate=lambda each: folder)
        asked = [request(*TEXTS, (2, 10, 3)), request(*["the end"] * 50), request("paris")]

        async def vectors(each: GenerateRequest, host: Host = host) -> Any:
            [chunk] = [chunk async for chunk in host.ask("vectors", each)]
            assert chunk.usage is not None
            return read_vectors(chunk.value, len(each.inputs), expert="vectors"), chunk.usage.prompt_tokens

        found = await asyncio.gather(*map(vectors, asked))
        for refused, why in ((request("the " * 30), "reads at most 24"), (request((99,)), "token id 99")):
            with pytest.raises(Rejected, match=why):
                await vectors(refused)
        with pytest.raises(Rejected, match="generates no text"):
            await anext(host.ask("vectors", GenerateRequest(prompt="hi")))
        if name == "vllm":
            expert = host.cache.peek(known.ref)
            assert isinstance(expert, VLLMEmbedder) and expert.unhealthy() is None
            assert (await expert.core.live()).llm.get_num_unfinished_requests() == 0
        await host.aclose()
        theirs[name] = found
    for (ours, n_ours), (hf, n_hf) in zip(theirs["vllm"], theirs["hf"], strict=True):
        assert np.allclose(ours, hf, atol=1e-5) and n_ours == n_hf
    assert np.allclose(np.linalg.norm(theirs["vllm"][0][0], axis=1), 1, atol=1e-5)


@pytest.mark.vllm
@pytest.mark.integration
async def test_inputs_are_given_to_the_next_process_once_and_leave_nothing_behind(tmp_path: Path) -> None:
    set_environment(Options())  # before vLLM is imported, as when the engine starts
    from transformers import AutoTokenizer
    from vllm.v1.engine.exceptions import EngineDeadError

    folder = save_tiny_embedder(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    deaths, running = 1, 0

    class LLM:
        errored = False

        async def encode(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            nonlocal running
            running += 1
            try:
                await asyncio.sleep(0)
                if len(started) <= deaths:
                    raise EngineDeadError
                await asyncio.sleep(0.01)
                import torch

                yield SimpleNamespace(outputs=SimpleNamespace(data=torch.ones(3)))
            finally:
                running -= 1

        def shutdown(self, timeout: float) -> None:
            pass

    started: list[LLM] = []

    async def start() -> Pooling:
        started.append(LLM())
        return Pooling(started[-1], tokenizer, 12, 24)

    expert = VLLMEmbedder(spec(folder), folder, Options(max_num_seqs=2))
    expert.core._start = start  # type: ignore[method-assign]
    await expert.core.open()
    [chunk] = [chunk async for chunk in expert.generate(request(*["the"] * 9))]
    assert read_vectors(chunk.value, 9, expert="v").shape == (9, 3) and len(started) == 2
    deaths = 99
    with pytest.raises(EngineLost, match="died twice"):
        [_ async for _ in expert.generate(request(*["the"] * 9))]
    assert running == 0
    await expert.core.close()


@pytest.mark.vllm
@pytest.mark.integration
async def test_a_folder_that_does_not_state_its_pooling_starts_no_process(tmp_path: Path) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    known = spec(folder)
    (folder / "modules.json").unlink()
    engine = VLLMEngine(**OPTIONS)
    slot = await engine.open_slot(engine.shape(known))
    with pytest.raises(WeightsError, match=r"has no modules\.json"):
        await slot.switch(known, folder)
    assert slot.expert is None
