"""Loading: devices, dtypes, memory, and every kind of broken model files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coe.engines.hf.engine import HFEngine
from coe.engines.hf.load import choose_device, choose_dtype, free_bytes, is_out_of_memory, load_model, translate
from coe.errors import ConfigError, EngineError, OutOfMemory, WeightsError
from registry.spec import ExpertSpec, FileRecord, Kind


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def lose_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def grow_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(33)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def auto_map(folder: Path) -> None:
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (folder / "configuration_mine.py").write_text("raise SystemExit('code of the repository ran')")


SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("broken config", lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
    ("truncated", truncate, "cannot be loaded"),
    ("lacking", weights(lose_norm), "lacks 1 of the model's weights, such as model.norm.weight"),
    ("other shapes", weights(grow_norm), "cannot be loaded"),
    ("pickle", pickle_instead, "cannot be loaded"),
    ("code", auto_map, "cannot be loaded"),
    ("unknown kind", lambda f: edit(f / "config.json", model_type="nonsense"), "cannot be loaded"),
    ("not causal", lambda f: edit(f / "config.json", model_type="vit"), "cannot be loaded"),
    ("an adapter", lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter: register it"),
    (
        "kernels",
        lambda f: edit(f / "config.json", attn_implementation="some/kernel"),
        "attention code|cannot be loaded",
    ),
]


@pytest.mark.parametrize(("spoil", "match"), [s[1:] for s in SPOILT], ids=[s[0] for s in SPOILT])
@pytest.mark.filterwarnings("ignore")
def test_files_that_are_wrong_are_a_weights_error(copied: Path, spoil: Callable[[Path], None], match: str) -> None:
    spoil(copied)
    with pytest.raises(WeightsError, match=match) as info:
        load_model("broken", copied, "cpu", torch.float32)
    assert "'broken'" in str(info.value)


def test_what_a_repository_recommends_for_sampling_is_not_taken_over(copied: Path) -> None:
    edit(
        copied / "generation_config.json", repetition_penalty=9.0, do_sample=True, temperature=3.0, eos_token_id=[1, 7]
    )
    loaded = load_model("tiny", copied, "cpu", torch.float32)
    assert loaded.eos == {1, 7}
    assert loaded.model.generation_config.repetition_penalty is None
    assert not loaded.model.generation_config.do_sample
    assert loaded.context_length == 512
    assert loaded.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32


async def test_too_little_memory_is_found_before_loading(tiny: Path) -> None:
    spec = ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(tiny))
    size = (tiny / "model.safetensors").stat().st_size
    asked: list[str] = []

    def free(device: str) -> int:
        asked.append(device)
        return size - 1

    with pytest.raises(OutOfMemory, match="'tiny' needs 0 MiB on cpu and 0 MiB are free"):
        await HFEngine("cpu", "bfloat16", free=free).load(spec, tiny)
    assert asked == ["cpu"]


def test_the_footprint_is_the_weights_in_the_engines_dtype() -> None:
    def footprint(dtype: str, source: str = "m", **fields: Any) -> int:
        return HFEngine("cpu", dtype).footprint(ExpertSpec(name="m", kind=Kind.MODEL, source=source, **fields))

    assert footprint("bfloat16", parameters_total=100, size_bytes=1) == 200
    assert footprint("float32", parameters_total=100) == 400
    assert footprint("bfloat16", size_bytes=100) == 100
    assert footprint("float32", size_bytes=100) == 200
    assert footprint("bfloat16", size_bytes=100, source="m.gguf") == 800
    assert footprint("bfloat16", size_bytes=100, source="M.GGUF") == 800
    for name, n_bytes in (("3b9f7c0de1", 800), ("model.safetensors", 100)):
        record = FileRecord(name=name, size_bytes=100, sha256="0" * 64)
        assert footprint("bfloat16", size_bytes=100, files=(record,)) == n_bytes
    with pytest.raises(WeightsError, match="size of 'm' is not known"):
        footprint("bfloat16")


def test_a_device_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return choose_device("auto")

    assert [machine(True, True), machine(False, True), machine(False, False)] == ["cuda", "mps", "cpu"]
    assert choose_device("cpu") == "cpu"
    for device in ("cuda:1", "mps", "tpu"):
        with pytest.raises(ConfigError, match=f"{device!r} is not available; this machine has: cpu"):
            choose_device(device)


def test_a_dtype_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float16", "cpu") == torch.float16
    assert choose_dtype("auto", "cpu") in (torch.bfloat16, torch.float32)
    assert choose_dtype("auto", "mps") == torch.bfloat16
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        emulated_or = partial(lambda supported, including_emulation: supported or including_emulation, supported)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated_or)
        assert choose_dtype("auto", "cuda:0") == expected
    with pytest.raises(ConfigError, match="'int4' is not supported; there are: auto, bfloat16"):
        choose_dtype("int4", "cpu")


def test_options_of_the_engine_are_checked() -> None:
    for option in ("max_batch", "max_adapters", "threads"):
        with pytest.raises(ConfigError, match=f"{option} must be at least 1, got 0"):
            HFEngine(**{option: 0})


def test_free_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes("cpu") > 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_bytes("cuda:0") == 123


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (OSError("Cannot allocate memory (os error 12)"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with (
        pytest.raises(OutOfMemory if expected else WeightsError, match="^here: ") as info,
        translate("here", WeightsError),
    ):
        raise error
    assert info.value.__cause__ is error


def test_our_own_errors_pass_unchanged() -> None:
    with pytest.raises(EngineError, match="^mine$"), translate("here", WeightsError):
        raise EngineError("mine")
