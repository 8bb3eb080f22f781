"""Faults of every way in: files that change and loads that fail half-way give an error, never a mixture of weights."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_models import model_spec, save_other_weights
from safetensors.torch import load_file, save_file

from coe.engines.hf.engine import HFEngine
from coe.engines.hf.slot import HFSlot
from coe.engines.hf.weights.in_place import InPlace
from coe.errors import EngineError, WeightsError
from coe.experts import locate
from coe.host import Host
from coe.types import GenerateRequest
from registry.describe import describe
from registry.store import Registry

ASK = GenerateRequest(prompt="the capital of france", max_tokens=8)
WAYS = ("new load", "in place", "copy", "read ahead")


@pytest.fixture
def folders(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three checkpoints of one shape, last changed long ago."""
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    a = Path(shutil.copytree(tiny, tmp_path / "a"))
    b = save_other_weights(a, tmp_path / "b")
    c = Path(shutil.copytree(a, tmp_path / "c"))
    tensors = {name: each.roll(1, 0).contiguous() for name, each in load_file(a / "model.safetensors").items()}
    save_file(tensors, c / "model.safetensors")
    folders = {"a": a, "b": b, "c": c}
    for folder in folders.values():
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))
    return folders


@pytest.fixture(params=WAYS)
async def way(request: pytest.FixtureRequest, folders: dict[str, Path]) -> AsyncIterator[tuple[str, Host]]:
    """A host that has answered with `a`, and brings `b` in by one of the ways next."""
    name: str = request.param
    with Registry("sqlite://") as registry:
        registry.change([describe(model_spec(each).model_copy(update={"name": n})) for n, each in folders.items()])
        snapshot = registry.snapshot()
    size = snapshot.experts["a"].size_bytes or 0
    engine = HFEngine("cpu", "float32", host_bytes=0 if name in ("new load", "in place") else 4 * size)
    budget = engine.footprint(snapshot.experts["a"])
    host = Host(snapshot, {"hf": engine}, budget_bytes=budget, locate=locate)
    if name != "new load":
        await ask(host, "a")
    if name == "copy":
        await ask(host, "b")
        await ask(host, "a")
        assert "b@1" in host.cache.copied
    if name == "read ahead":
        host.cache.read_ahead("b@1")
        assert host.cache._reading_ahead is not None
        await host.cache._reading_ahead
        assert "b@1" in host.cache.copied
    yield name, host
    await host.aclose()


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, ASK)])


async def right(folder: Path) -> str:
    engine = HFEngine("cpu", "float32")
    expert = await engine.load(model_spec(folder), folder)
    try:
        return "".join([chunk.text async for chunk in expert.generate(ASK)])
    finally:
        await engine.unload(expert)


async def test_weights_that_have_changed_since_are_refused_and_those_that_are_back_answer(
    way: tuple[str, Host], folders: dict[str, Path]
) -> None:
    _, host = way
    answers = {name: await right(folder) for name, folder in folders.items()}
    assert len(set(answers.values())) == 3
    file = folders["b"] / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes((folders["c"] / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="model.safetensors differs"):
        await ask(host, "b")
    assert await ask(host, "a") == answers["a"]
    file.write_bytes(good)
    assert [await ask(host, name) for name in "bcba"] == [answers[name] for name in "bcba"]


async def test_weights_that_change_between_the_check_and_the_read_are_not_served(
    way: tuple[str, Host], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = way
    file = folders["b"] / "model.safetensors"
    good, other = file.read_bytes(), (folders["c"] / "model.safetensors").read_bytes()
    switch = HFSlot.switch

    async def swapped(slot: HFSlot, spec: Any, path: Path) -> Any:
        file.write_bytes(other)
        return await switch(slot, spec, path)

    monkeypatch.setattr(HFSlot, "switch", swapped)
    with pytest.raises(WeightsError, match="model.safetensors differs"):
        await ask(host, "b")
    monkeypatch.undo()
    assert "b" not in host.resident
    file.write_bytes(good)
    assert await ask(host, "a") == await right(folders["a"])
    assert await ask(host, "b") == await right(folders["b"])


async def test_a_load_that_fails_half_way_is_tried_again_and_nothing_of_it_is_served(
    way: tuple[str, Host], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, host = way

    def broken(*args: Any, **options: Any) -> Any:
        raise MemoryError("no memory left")

    def half(model: InPlace, tensors: Any, stop: threading.Event | None = None) -> None:
        given = iter(tensors)
        for _ in range(3):
            key, tensor = next(given)
            model.tensors[key].data.copy_(tensor)
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        if name == "new load":
            patch.setattr(HFEngine, "_load", broken)
        else:
            patch.setattr(InPlace, "copy", half)
        with pytest.raises(EngineError, match="no memory left|'b'"):
            await ask(host, "b")
        assert not host.resident, "the model has weights of both, or none"
    assert await ask(host, "a") == await right(folders["a"])
    assert await ask(host, "b") == await right(folders["b"])
    assert not host.cache.failing


async def test_a_copy_that_cannot_be_read_leaves_the_load_to_the_files(
    way: tuple[str, Host], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = way

    async def broken(slot: HFSlot, spec: Any, path: Path) -> int:
        raise MemoryError("no memory left for a copy")

    monkeypatch.setattr(HFSlot, "prefetch", broken)
    assert await ask(host, "c") == await right(folders["c"])
    assert "c@1" not in host.cache.copied
