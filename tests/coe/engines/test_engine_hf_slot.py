"""Slots of the hf engine: weights replaced in place give the answers of a fresh load, and faults leave no mixture."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, save_other_weights, save_tiny_model, say

from coe.engines.base import Adapter, ShapeKey, SlotEngine
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.slot import HFSlot
from coe.engines.hf.weights import files as weight_files
from coe.engines.hf.weights.files import WeightFiles
from coe.engines.hf.weights.host_copies import HostCopies
from coe.engines.hf.weights.in_place import InPlace
from coe.errors import EngineError, WeightsError
from coe.host import Host
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

REQUEST = GenerateRequest(messages=(Message("user", "the capital of france"),), max_tokens=16)


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    return tiny, save_other_weights(tiny, tmp_path_factory.mktemp("other") / "model")


def spec_of(folder: Path, name: str = "tiny") -> ExpertSpec:
    return model_spec(folder).model_copy(update={"name": name, "architecture": "Llama", "parameters_total": 50_000})


async def slot_of(engine: HFEngine) -> HFSlot:
    return await engine.open_slot(ShapeKey("Llama"))


async def text_of(expert: Any, adapter: Adapter | None = None) -> str:
    return (await say(expert, REQUEST, adapter)).text


async def fresh_answer(folder: Path) -> str:
    engine = HFEngine("cpu", "float32")
    expert = await engine.load(spec_of(folder), folder)
    try:
        return await text_of(expert)
    finally:
        await engine.unload(expert)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def test_models_of_one_architecture_and_size_share_a_shape(engine: HFEngine, tiny: Path) -> None:
    assert isinstance(engine, SlotEngine)
    a, b = spec_of(tiny, "a"), spec_of(tiny, "b")
    assert engine.shape(a) == engine.shape(b)
    assert engine.shape(a) != engine.shape(b.model_copy(update={"parameters_total": 60_000}))
    unknown = [each.model_copy(update={"parameters_total": None}) for each in (a, b)]
    vectors = [each.model_copy(update={"kind": Kind.EMBEDDING}) for each in (a, b)]
    for one, other in (unknown, vectors):
        assert engine.shape(one) != engine.shape(other)


async def test_weights_replaced_in_place_answer_like_a_fresh_load(pair: tuple[Path, Path]) -> None:
    first, second = pair
    slot = await slot_of(HFEngine("cpu", "float32"))
    one: Any = await slot.switch(spec_of(first, "first"), first)
    answer, model = await text_of(one), one.loaded.model
    two: Any = await slot.switch(spec_of(second, "second"), second)
    assert two.loaded.model is model
    assert await text_of(two) == await fresh_answer(second) != answer
    again: Any = await slot.switch(spec_of(first, "first"), first)
    assert again.loaded.model is model
    assert await text_of(again) == answer
    with pytest.raises(EngineError, match=r"'second' was unloaded"):
        await text_of(two)
    await slot.close()
    assert slot.expert is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_weights_of_another_type_are_converted(pair: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    first, second = pair
    short = Path(shutil.copytree(second, tmp_path / "short"))
    tensors = {name: each.half() for name, each in load_file(second / "model.safetensors").items()}
    save_file(tensors, short / "model.safetensors")
    engine = HFEngine("cpu", dtype)
    slot = await slot_of(engine)
    model = (await slot.switch(spec_of(first), first)).loaded.model  # type: ignore[union-attr]
    switched: Any = await slot.switch(spec_of(short), short)
    assert switched.loaded.model is model
    own = model.state_dict()
    assert all(torch.equal(own[name], each.to(own[name].dtype)) for name, each in tensors.items())
    await slot.close()


async def test_adapters_of_the_former_expert_leave_the_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    folder = save_adapter(tmp_path / "tuned", first)
    adapter = Adapter(adapter_spec(folder), folder)
    slot = await slot_of(HFEngine("cpu", "float32"))
    one: Any = await slot.switch(spec_of(first), first)
    model, base, tuned = one.loaded.model, await text_of(one), await text_of(one, adapter)
    assert tuned != base
    two: Any = await slot.switch(spec_of(second), second)
    assert two.loaded.model is model
    assert await text_of(two) == await fresh_answer(second)
    back: Any = await slot.switch(spec_of(first), first)
    assert (await text_of(back), await text_of(back, adapter)) == (base, tuned)
    await slot.close()


async def test_end_tokens_and_template_are_those_of_the_new_expert(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    other = Path(shutil.copytree(second, tmp_path / "other"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 9]}))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    slot = await slot_of(HFEngine("cpu", "float32"))
    one: Any = await slot.switch(spec_of(first), first)
    model, before = one.loaded.model, one.loaded.eos
    two: Any = await slot.switch(spec_of(other), other)
    assert two.loaded.model is model
    assert two.loaded.eos == {*before, 1, 7, 9}
    said = await say(two, REQUEST)
    assert said.usage is not None
    assert said.usage.prompt_tokens == len(two.loaded.tokenizer.encode("the capital of france!"))
    await slot.close()


async def test_a_model_of_another_config_is_loaded_by_transformers(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide", tokenizer, intermediate_size=96)
    tied = save_tiny_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    slot = await slot_of(HFEngine("cpu", "float32"))
    model = (await slot.switch(spec_of(tiny), tiny)).loaded.model  # type: ignore[union-attr]
    for folder in (wide, tied):
        expert: Any = await slot.switch(spec_of(folder), folder)
        assert expert.loaded.model is not model
        assert await text_of(expert) == await fresh_answer(folder)
        model = expert.loaded.model
    tied_other = save_other_weights(tied, tmp_path / "tied-other")
    expert = await slot.switch(spec_of(tied_other), tied_other)
    assert expert.loaded.model is model  # a tied weight has one tensor in the file
    assert await text_of(expert) == await fresh_answer(tied_other)
    await slot.close()


async def test_what_transformers_changes_as_it_loads_is_not_replaced_in_place(pair: tuple[Path, Path]) -> None:
    first, second = pair
    engine = HFEngine("cpu", "float32")
    slot = await slot_of(engine)
    expert: Any = await slot.switch(spec_of(first), first)
    assert InPlace.of(expert.loaded.model, WeightFiles(first)) is not None
    assert InPlace.of(expert.loaded.model, WeightFiles(second)) is None
    square = expert.loaded.model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    square.copy_(square.t().clone())  # of the same shape, as some checkpoints are stored
    assert InPlace.of(expert.loaded.model, WeightFiles(first)) is None
    await slot.close()


async def test_damaged_files_leave_the_former_expert(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    damaged = Path(shutil.copytree(second, tmp_path / "damaged"))
    truncate(damaged)
    slot = await slot_of(HFEngine("cpu", "float32"))
    one: Any = await slot.switch(spec_of(first), first)
    answer = await text_of(one)
    with pytest.raises(WeightsError, match="truncated") as caught:
        await slot.switch(spec_of(damaged, "damaged"), damaged)
    assert str(tmp_path) not in str(caught.value.public)
    assert slot.expert is one
    assert await text_of(one) == answer
    await slot.close()


async def test_files_cut_short_while_they_are_copied_leave_an_empty_slot(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    cut = Path(shutil.copytree(second, tmp_path / "cut"))
    slot = await slot_of(HFEngine("cpu", "float32"))
    await slot.switch(spec_of(first), first)
    tensors = WeightFiles.tensors

    def cut_first(files: WeightFiles, stop: threading.Event | None = None) -> Any:
        truncate(files.folder)
        return tensors(files, stop)

    monkeypatch.setattr(WeightFiles, "tensors", cut_first)
    with pytest.raises(WeightsError, match="is truncated"):
        await slot.switch(spec_of(cut), cut)
    assert slot.expert is None
    monkeypatch.undo()
    assert await text_of(await slot.switch(spec_of(second), second)) == await fresh_answer(second)
    await slot.close()


async def test_a_cancelled_switch_ends_its_copy_and_leaves_an_empty_slot(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    slot = await slot_of(HFEngine("cpu", "float32"))
    await slot.switch(spec_of(first), first)
    started, ended = threading.Event(), threading.Event()
    tensors = WeightFiles.tensors

    def slow(files: WeightFiles, stop: threading.Event | None = None) -> Any:
        started.set()
        assert stop is not None
        assert stop.wait(30)
        try:
            yield from tensors(files, stop)
        finally:
            ended.set()

    monkeypatch.setattr(WeightFiles, "tensors", slow)
    switching = asyncio.ensure_future(slot.switch(spec_of(second), second))
    await asyncio.to_thread(started.wait, 30)
    switching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await switching
    assert ended.is_set()
    assert slot.expert is None
    monkeypatch.undo()
    assert await text_of(await slot.switch(spec_of(first), first)) == await fresh_answer(first)
    await slot.close()


async def test_running_answers_end_before_the_weights_change(pair: tuple[Path, Path]) -> None:
    first, second = pair
    request = GenerateRequest(messages=REQUEST.messages, max_tokens=200)
    slot = await slot_of(HFEngine("cpu", "float32"))
    one: Any = await slot.switch(spec_of(first), first)
    answer = (await say(one, request)).text
    running = one.generate(request)
    begun = (await anext(running)).text
    switching = asyncio.ensure_future(slot.switch(spec_of(second), second))
    assert begun + "".join([chunk.text async for chunk in running]) == answer
    switched = await switching
    assert slot.expert is switched
    await slot.close()


# Copies in host memory


async def test_weights_read_ahead_are_not_read_again(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    engine = HFEngine("cpu", "float32", host_bytes=2**30)
    slot = await slot_of(engine)
    await slot.switch(spec_of(first), first)
    assert await slot.prefetch(spec_of(second, "second"), second) == WeightFiles(second).size_bytes
    assert engine.copies.holds("second")
    reads: list[Any] = []
    monkeypatch.setattr(weight_files.WeightFiles, "_read", lambda *args, **options: reads.append(args))
    switched = await slot.switch(spec_of(second, "second"), second)
    monkeypatch.undo()
    assert reads == []
    assert await text_of(switched) == await fresh_answer(second)
    await slot.close()


async def test_weights_that_the_model_cannot_take_are_not_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    engine = HFEngine("cpu", "float32", host_bytes=2**30)
    slot = await slot_of(engine)
    await slot.switch(spec_of(pair[0]), pair[0])
    assert await slot.prefetch(spec_of(other), other) == 0
    assert engine.copies.used_bytes == 0
    await slot.close()


def test_copies_stay_within_their_budget_until_one_is_dropped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(pair[0], tmp_path / name)) for name in "abc"]
    files = dict(zip("abc", map(WeightFiles, folders), strict=True))
    size = files["a"].size_bytes
    copies = HostCopies(2 * size, pin=False)
    assert [copies.read(name, files[name]) for name in "aabc"] == [size, size, size, 0]
    assert copies.used_bytes == copies.budget_bytes
    assert copies.get("c", files["c"]) is None
    copies.drop("b")
    assert copies.read("c", files["c"]) == size
    assert [copies.holds(name) for name in "abc"] == [True, False, True]
    assert HostCopies(size - 1, pin=False).read("a", files["a"]) == 0


def test_a_copy_of_files_that_have_changed_is_not_used(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "changing"))
    copies = HostCopies(2**30, pin=False)
    assert copies.read("a", WeightFiles(folder))
    before = copies.get("a", WeightFiles(folder))
    shutil.copyfile(pair[1] / "model.safetensors", folder / "model.safetensors")
    assert copies.get("a", WeightFiles(folder)) is None
    assert not copies.holds("a")
    assert copies.read("a", WeightFiles(folder))
    after = copies.get("a", WeightFiles(folder))
    assert before is not None
    assert after is not None
    name = "lm_head.weight"
    assert not torch.equal(before.tensors[name], after.tensors[name])


def test_files_that_change_while_they_are_read_are_not_kept(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "changing"))
    read = WeightFiles.read

    def changed(files: WeightFiles, **options: Any) -> Any:
        tensors = read(files, **options)
        shutil.copyfile(pair[1] / "model.safetensors", folder / "model.safetensors")
        return tensors

    monkeypatch.setattr(WeightFiles, "read", changed)
    copies = HostCopies(2**30, pin=False)
    assert copies.read("a", WeightFiles(folder)) == 0
    assert not copies.holds("a")
    assert copies.used_bytes == 0


def test_threads_that_want_one_copy_read_it_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads, go = WeightFiles.read, [], threading.Event()

    def counted(files: WeightFiles, **options: Any) -> Any:
        reads.append(files)
        assert go.wait(30)
        return read(files, **options)

    monkeypatch.setattr(WeightFiles, "read", counted)
    copies = HostCopies(2**30, pin=False)
    found: list[Any] = []

    def want(number: int) -> None:
        if number % 2:
            copies.read("a", WeightFiles(pair[0]))
        found.append(copies.get("a", WeightFiles(pair[0])))

    threads = [threading.Thread(target=want, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
        while not reads:  # the first one reads, the others wait for it
            pass
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(reads) == 1
    assert len({id(copy) for copy in found}) == 1
    assert len(found) == 4


def test_shards_are_read_like_one_file(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = WeightFiles(tmp_path)
    assert len(files.stamps) > 1
    whole = WeightFiles(tiny).read(pin=False)
    assert {name: each.tolist() for name, each in files.read(pin=False).items()} == {
        name: each.tolist() for name, each in whole.items()
    }
    assert {name: each.tolist() for name, each in files.tensors()} == {name: e.tolist() for name, e in whole.items()}


async def test_experts_with_equal_tokenizer_files_share_one_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    engine = HFEngine("cpu", "float32")
    experts = [await engine.load(spec_of(folder), folder) for folder in (*pair, other)]
    one, two, three = (expert.loaded.tokenizer for expert in experts if isinstance(expert, HFExpert))
    assert one is two
    assert three is not one
    for expert in experts:
        await engine.unload(expert)


async def test_a_host_switches_models_of_one_shape_in_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = save_other_weights(pair[1], tmp_path / "third")
    folders = {"a": pair[0], "b": pair[1], "c": Path(shutil.copytree(third, tmp_path / "c"))}
    truncate(third)
    specs = {name: spec_of(folder, name) for name, folder in folders.items()}
    snapshot = Snapshot(1, specs)
    size = HFEngine("cpu", "float32").footprint(specs["a"])
    host = Host(
        snapshot, {"hf": HFEngine("cpu", "float32")}, budget_bytes=2 * size, locate=lambda spec: folders[spec.name]
    )
    texts: dict[str, list[str]] = {name: [] for name in folders}
    for name in "abcabc":
        texts[name].append("".join([chunk.text async for chunk in host.ask(name, REQUEST)]))
    for name, folder in folders.items():
        assert set(texts[name]) == {await fresh_answer(folder)}
    assert (host.cache.stats.loads, host.cache.stats.switches) == (6, 4)
    await host.aclose()


async def test_a_host_keeps_copies_within_their_budget_and_answers_the_same_from_them(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"a": pair[0], "b": pair[1], "c": save_other_weights(pair[1], tmp_path / "third")}
    specs = {
        name: spec_of(folder, name).model_copy(update={"size_bytes": WeightFiles(folder).size_bytes})
        for name, folder in folders.items()
    }
    size = WeightFiles(pair[0]).size_bytes
    engine = HFEngine("cpu", "float32", host_bytes=2 * size)
    budget = engine.footprint(specs["a"])
    host = Host(Snapshot(1, specs), {"hf": engine}, budget_bytes=budget, locate=lambda spec: folders[spec.name])
    texts: dict[str, set[str]] = {name: set() for name in folders}
    for name in "abcbcbca":
        texts[name].add("".join([chunk.text async for chunk in host.ask(name, REQUEST)]))
        assert engine.copies.used_bytes == host.cache.copied_bytes <= 2 * size
    assert texts == {name: {await fresh_answer(folder)} for name, folder in folders.items()}
    assert "a" in host.cache.copied
    assert len(host.cache.copied) == 2
    await host.aclose()
