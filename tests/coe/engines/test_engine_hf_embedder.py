"""Embedding models on the hf engine: vectors as sentence-transformers has them, batches, refusals, hostile files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import save_tiny_embedder, save_tiny_model
from sentence_transformers import SentenceTransformer

from coe.engines.embedding import read_vectors
from coe.engines.hf.embedder import HFEmbedder, batches
from coe.engines.hf.engine import HFEngine
from coe.errors import EngineError, OutOfMemory, Rejected, Unsupported, WeightsError
from coe.host import Host
from coe.types import Chunk, GenerateRequest
from registry.describe import describe
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

TEXTS = ("the capital of france is paris", "the end", "paris", "of", "the capital of the end is the capital of paris")


def spec(folder: Path, **fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": "vectors", "kind": Kind.EMBEDDING, "source": str(folder)} | fields).stated()


def request(*inputs: str | tuple[int, ...]) -> GenerateRequest:
    return GenerateRequest(prompt="", inputs=inputs, wants="embedding", stream=False)


async def embedded(expert: HFEmbedder, *inputs: str | tuple[int, ...]) -> tuple[np.ndarray, Chunk]:
    [chunk] = [chunk async for chunk in expert.generate(request(*inputs))]
    return read_vectors(chunk.value, len(inputs), expert="vectors"), chunk


async def loaded(folder: Path, **options: Any) -> HFEmbedder:
    expert = await HFEngine(device="cpu", **options).load(describe(spec(folder)), folder)
    assert isinstance(expert, HFEmbedder)
    return expert


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", True)])
async def test_vectors_are_those_of_sentence_transformers_in_any_batch(
    tmp_path: Path, pooling: str, normalize: bool
) -> None:
    folder = save_tiny_embedder(tmp_path / "m", pooling=pooling, normalize=normalize)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))
    for max_batch in (1, 2, 32):
        expert = await loaded(folder, max_batch=max_batch)
        ours, last = await embedded(expert, *TEXTS)
        assert np.allclose(ours, theirs, atol=1e-5) and ours.shape == (5, 64)
        assert last.usage is not None and last.finish_reason == "stop"
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (sum(len(t.split()) + 2 for t in TEXTS), 0)
        await expert.close()
    assert (np.abs(np.linalg.norm(ours, axis=1) - 1) < 1e-5).all() == normalize


async def test_a_token_without_a_row_in_the_weights_is_refused_before_the_model_reads_it(tmp_path: Path) -> None:
    """A tokenizer may have more tokens than the model; on a GPU, reading beyond the weights ends the process."""
    folder = save_tiny_embedder(tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    n_ids = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"]["berlin"] = n_ids
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    expert = await loaded(folder)
    for given in ("berlin", (2, n_ids, 3)):
        with pytest.raises(Rejected, match=f"token id {n_ids}, but the vocabulary of 'vectors' has {n_ids} tokens"):
            await embedded(expert, "paris", given)
    await embedded(expert, (2, n_ids - 1, 3))
    await expert.close()


async def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    expert = await loaded(folder)
    ours, _ = await embedded(expert, (2, 10, 3), "paris")  # [CLS] paris [SEP]
    assert np.allclose(ours[0], ours[1], atol=1e-6)
    await expert.close()


async def test_inputs_that_are_refused_name_their_place(tmp_path: Path) -> None:
    expert = await loaded(save_tiny_embedder(tmp_path / "m"))
    longest = " ".join(["the"] * 22)  # and two special tokens: 24
    assert (await embedded(expert, longest))[0].shape == (1, 64)
    with pytest.raises(Rejected, match=r"input\[1\] has 25 tokens, and 'vectors' reads at most 24") as error:
        await embedded(expert, "the", longest + " end")
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input[1]")
    with pytest.raises(Rejected, match=r"input\[0\] has the token id 12, but the vocabulary of 'vectors' has 12"):
        await embedded(expert, (12,))
    with pytest.raises(Rejected, match="send texts to /v1/embeddings"):
        await anext(expert.generate(GenerateRequest(messages=(Message("user", "hi"),), wants="embedding")))
    assert (await embedded(expert, "the"))[0].shape == (1, 64)
    await expert.close()
    with pytest.raises(EngineError, match="was unloaded"):
        await embedded(expert, "the")


async def test_a_closed_request_ends_after_its_batch_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = await loaded(save_tiny_embedder(tmp_path / "m"), max_batch=1)
    done: list[int] = []
    embed = expert._embed
    monkeypatch.setattr(expert, "_embed", lambda rows: (done.append(len(rows)), embed(rows))[1])
    many = asyncio.ensure_future(embedded(expert, *["the"] * 2000))
    while not done:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    few = await embedded(expert, "the")  # between batches of the other
    assert len(few[0]) == 1 and not many.done()
    many.cancel()
    with pytest.raises(asyncio.CancelledError):
        await many
    before = len(done)
    await embedded(expert, "the")
    assert len(done) <= before + 2 < 2000
    await expert.close()


def test_batches_have_similar_lengths_and_bounded_tokens() -> None:
    assert list(batches([1, 9, 2, 8], 2)) == [[1, 3], [2, 0]]
    assert list(batches([4, 4, 4], 9, most_tokens=8)) == [[0, 1], [2]]
    assert list(batches([50, 1], 9, most_tokens=8)) == [[0], [1]]
    assert list(batches([], 9)) == []


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("modules.json", None, "has no modules.json"),
        ("modules.json", {"a": 1}, "cannot be read"),
        ("modules.json", [], "must name a Transformer, then one Pooling"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "no model.saf"),
        ("1_Pooling/config.json", {}, "must name a Transformer, then one Pooling"),
        ("modules.json", [{"type": "os.system", "path": ""}], "names 'os.system'; supported are Dense"),
        ("modules.json", [{"type": "sentence_transformers.util.http_get", "path": ""}], "http_get'; supported are"),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../x"}], "is not inside"),
        ("sentence_bert_config.json", {"model_args": {"attn_implementation": "a/b"}}, "`model_args` in sentence_bert"),
        ("config.json", {"_attn_implementation": "org/kernel"}, "attention code from a repository"),
    ],
)
async def test_a_folder_that_could_run_code_is_not_loaded(tmp_path: Path, file: str, value: Any, message: str) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    known = describe(spec(folder))
    if value is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps(value))
    with pytest.raises(WeightsError, match=message):
        await HFEngine(device="cpu").load(known, folder)


async def test_damaged_weights_and_too_little_memory_fail_the_load(tmp_path: Path) -> None:
    folder = save_tiny_embedder(tmp_path / "m")
    known = describe(spec(folder))
    with pytest.raises(OutOfMemory):
        await HFEngine(device="cpu", free=lambda device: 10).load(known, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError):
        await HFEngine(device="cpu").load(known, folder)


async def test_the_host_serves_it_beside_models_and_keeps_them_apart(tmp_path: Path) -> None:
    from engine_models import make_tokenizer

    folder = save_tiny_embedder(tmp_path / "m")
    chat = save_tiny_model(tmp_path / "chat", make_tokenizer())
    experts = [describe(spec(folder)), describe(ExpertSpec(name="chat", kind=Kind.MODEL, source=str(chat)))]
    engine = HFEngine(device="cpu", dtype="float32")
    host = Host(
        Snapshot(1, {each.name: each for each in experts}),
        {"hf": engine},
        budget_bytes=2**30,
        locate=lambda each: Path(each.source),
    )
    [chunk] = [chunk async for chunk in host.ask("vectors", request("the end"))]
    assert read_vectors(chunk.value, 1, expert="vectors").shape == (1, 64) and chunk.timing is not None
    with pytest.raises(Rejected, match="'vectors' is an embedding model, which generates no text"):
        await anext(host.ask("vectors", GenerateRequest(prompt="hi")))
    with pytest.raises(Unsupported, match="'chat' generates text and returns no vectors"):
        await anext(host.ask("chat", request("hi")))
    assert host.resident == {"vectors", "chat"}
    await host.aclose()
    assert not host.resident
