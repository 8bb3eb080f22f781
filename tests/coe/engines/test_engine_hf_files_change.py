"""Files that change under a resident expert: it keeps its weights; a reload notices and refuses, the others go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, save_tiny_model
from safetensors.torch import load_file

from coe.engines.hf.engine import HFEngine
from coe.errors import WeightsError
from coe.experts import locate
from coe.host import Host
from coe.protocol.errors import error_body
from coe.types import GenerateRequest
from registry.describe import describe
from registry.errors import DigestMismatch
from registry.spec import ExpertSpec
from registry.store import Registry

ASK = GenerateRequest(prompt="the capital of france", max_tokens=8)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model, last changed long ago."""
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    for file in copy.iterdir():
        os.utime(file, (1e9, 1e9))
    return copy


@pytest.fixture
def specs(folder: Path, tokenizer: Any, tmp_path: Path) -> list[ExpertSpec]:
    other = save_tiny_model(tmp_path / "other", tokenizer, num_hidden_layers=1)
    adapter = save_adapter(tmp_path / "adapter", folder)
    model = describe(model_spec(folder))
    return [
        model,
        describe(model_spec(other).model_copy(update={"name": "other"})),
        describe(adapter_spec(adapter).model_copy(update={"name": "adapter"}), model),
    ]


@pytest.fixture
async def host(specs: list[ExpertSpec]) -> AsyncIterator[Host]:
    with Registry("sqlite://") as registry:
        registry.change(specs)
        snapshot = registry.snapshot()
    engines = {"hf": HFEngine(device="cpu", dtype="float32")}
    host = Host(snapshot, engines, budget_bytes=2**30, locate=locate)
    yield host
    await host.aclose()


async def ask(host: Host, name: str) -> str:
    return "".join([chunk.text async for chunk in host.ask(name, ASK)])


async def evict(host: Host) -> None:
    await host.cache.aclose()


def other_weights(file: Path) -> bytes:
    """As many bytes, and another model."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    return bytes(data)


@pytest.mark.parametrize("change", ["copied over", "truncated", "emptied", "removed", "one byte"])
async def test_a_resident_expert_keeps_its_weights(host: Host, folder: Path, change: str) -> None:
    file, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    before, other = await ask(host, "tiny"), await ask(host, "other")
    if change == "removed":
        file.unlink()
    else:
        flipped = bytearray(good)
        flipped[-1] ^= 1
        new = {"copied over": other_weights(file), "truncated": good[:-4096], "emptied": b"", "one byte": flipped}
        with file.open("r+b") as opened:  # in place, as `cp` does
            opened.write(new[change])
            opened.truncate()
    assert await ask(host, "tiny") == before
    await evict(host)
    with pytest.raises(WeightsError) as info:
        await ask(host, "tiny")
    assert isinstance(info.value.__cause__, DigestMismatch) and str(folder) in str(info.value)
    assert "coe registry apply" in str(info.value)
    reason = {"truncated": "is truncated", "emptied": "is truncated", "removed": "is missing"}.get(change, "differs")
    status, body = error_body(info.value, logged_as="id-1")
    message = body["error"]["message"]
    assert (status, body["error"]["code"]) == (500, "invalid_weights")
    assert message.startswith("expert 'tiny' cannot answer: its files are not the registered ones (model.safetensors")
    assert reason in message and "id-1" in message
    assert str(folder) not in message and "coe registry" not in message
    assert await ask(host, "other") == other
    file.write_bytes(good)
    assert await ask(host, "tiny") == before


async def test_an_adapter_that_changes_is_refused_and_its_base_is_not(
    host: Host, specs: list[ExpertSpec], tmp_path: Path
) -> None:
    base, adapted = await ask(host, "tiny"), await ask(host, "adapter")
    assert adapted != base
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = file.read_bytes()
    file.write_bytes(other_weights(file))
    with pytest.raises(WeightsError, match="adapter_model.safetensors differs"):
        await ask(host, "adapter")
    assert await ask(host, "tiny") == base
    file.write_bytes(good)
    assert await ask(host, "adapter") == adapted


async def test_files_that_change_while_they_are_read_are_noticed(
    host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = HFEngine.load

    async def slow_load(engine: HFEngine, spec: ExpertSpec, path: Path) -> Any:
        expert = await load(engine, spec, path)
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        return expert

    monkeypatch.setattr(HFEngine, "load", slow_load)
    with pytest.raises(WeightsError, match="is truncated"):
        await ask(host, "tiny")
    assert host.resident == set()


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists mapped files on Linux only")
def test_no_weight_is_ever_in_a_mapped_file(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a load nor while it runs."""
    from transformers import modeling_utils

    from coe.engines.hf.load import load_model

    plain, during = modeling_utils.safe_open, []  # type: ignore[attr-defined]

    def watched(*args: Any, **settings: Any) -> Any:
        opened = plain(*args, **settings)
        during.append((settings["backend"], mapped(tiny)))
        return opened

    monkeypatch.setattr(modeling_utils, "safe_open", watched)
    for dtype in (torch.float32, torch.bfloat16):  # the file's type, and another
        model = load_model("tiny", tiny, "cpu", dtype).model
        assert mapped(tiny) == []
        assert torch.equal(model.lm_head.weight, load_file(tiny / "model.safetensors")["lm_head.weight"].to(dtype))
    assert during == [("pread", [])] * 2
    assert modeling_utils.safe_open is watched  # type: ignore[attr-defined]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tiny: Path, tmp_path: Path) -> None:
    """With a mapped file, the process would end."""
    from transformers import modeling_utils

    from coe.engines.hf.load import load_model

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    plain = modeling_utils.safe_open  # type: ignore[attr-defined]

    def shrinking(*args: Any, **settings: Any) -> Any:
        opened = plain(*args, **settings)
        os.truncate(folder / "model.safetensors", 4096)
        return opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "safe_open", shrinking)
        with pytest.raises(WeightsError, match="'tiny' cannot be loaded") as info:
            load_model("tiny", folder, "cpu", torch.float32)
    assert info.value.public == "expert 'tiny' cannot be loaded: its files are damaged or not supported"
