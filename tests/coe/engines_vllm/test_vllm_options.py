"""The options of the vLLM engine as its arguments; vLLM is not needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coe.config import Config
from coe.engine_config import EnginesConfig
from coe.engines import engine_kind, weights_engine
from coe.engines.base import ShapeKey, SlotEngine
from coe.engines.vllm.engine import PROCESS_BYTES, VLLMEngine
from coe.engines.vllm.options import CPU_CACHE_BYTES, Options
from coe.engines.vllm.process import check_folder, check_known, environment, set_environment, start_error
from coe.errors import ConfigError, OutOfMemory, WeightsError
from coe.hosting import engine_kinds, open_host
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


def arguments(on_cpu: bool = True, with_ray: bool = False, **options: Any) -> dict[str, Any]:
    return Options(**options).arguments(Path("/m"), "m", on_cpu=on_cpu, with_ray=with_ray)


def test_no_code_of_a_repository_runs_and_no_pickle_is_read() -> None:
    stated = arguments()
    assert (stated["trust_remote_code"], stated["load_format"]) == (False, "safetensors")


@pytest.mark.parametrize(
    ("size", "with_ray", "executor"), [(1, False, "uni"), (1, True, "uni"), (2, False, "mp"), (2, True, "ray")]
)
def test_one_device_takes_one_process_and_several_are_placed_by_ray(size: int, with_ray: bool, executor: str) -> None:
    stated = arguments(on_cpu=False, tensor_parallel_size=size, with_ray=with_ray)
    assert stated["distributed_executor_backend"] == executor


def test_ray_places_no_processes_on_a_cpu() -> None:
    assert arguments(on_cpu=True, tensor_parallel_size=2, with_ray=True)["distributed_executor_backend"] == "mp"


def test_processes_on_several_gpus_ask_ray_for_the_share_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    for parallel, share in ((1, None), (2, "0.4")):
        set_environment(Options(tensor_parallel_size=parallel, gpu_memory_utilization=0.4))
        assert os.environ.get("VLLM_RAY_PER_WORKER_GPUS") == share


def test_a_cpu_runs_eagerly_with_a_fixed_cache_and_a_gpu_by_its_share() -> None:
    cpu, gpu = arguments(on_cpu=True), arguments(on_cpu=False)
    assert (cpu["enforce_eager"], cpu["kv_cache_memory_bytes"]) == (True, CPU_CACHE_BYTES)
    assert "gpu_memory_utilization" not in cpu
    assert (gpu["enforce_eager"], gpu["kv_cache_memory_bytes"], gpu["gpu_memory_utilization"]) == (False, None, 0.75)
    assert arguments(on_cpu=False, eager=True, kv_cache_bytes=5)["kv_cache_memory_bytes"] == 5


def test_the_context_is_what_fits_the_cache_unless_it_is_stated() -> None:
    assert arguments()["max_model_len"] == -1  # vLLM fits it; its own default fails if the cache is too small
    assert arguments(max_model_len=99)["max_model_len"] == 99


def test_adapters_can_be_switched_off() -> None:
    assert "enable_lora" not in arguments(max_loras=0)
    gpu = arguments(on_cpu=False, max_loras=2, max_cpu_loras=8, max_lora_rank=64)
    assert (gpu["max_loras"], gpu["max_cpu_loras"], gpu["max_lora_rank"]) == (2, 8, 64)


def test_on_a_cpu_the_last_slot_of_adapters_is_never_taken() -> None:
    cpu = arguments(on_cpu=True, max_loras=2, max_cpu_loras=8)
    assert (cpu["max_loras"], cpu["max_cpu_loras"]) == (9, 9)


def test_processes_can_sleep_where_vllm_can() -> None:
    assert arguments(on_cpu=False)["enable_sleep_mode"] is True
    assert arguments(on_cpu=False, sleep=False)["enable_sleep_mode"] is False
    assert arguments(on_cpu=True)["enable_sleep_mode"] is False
    with pytest.raises(ConfigError, match="set `sleep` instead"):
        Options(engine_args={"enable_sleep_mode": True})


def test_further_arguments_are_passed_on_but_none_that_the_engine_depends_on() -> None:
    assert arguments(engine_args={"max_num_batched_tokens": 99})["max_num_batched_tokens"] == 99
    with pytest.raises(ConfigError, match="set `kv_cache_bytes` instead"):
        Options(engine_args={"kv_cache_memory_bytes": 1})
    with pytest.raises(ConfigError, match="'trust_remote_code' cannot be changed"):
        Options(engine_args={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="no argument 'max_batched'"):
        check_known({"max_batched": 1, "seed": 2}, {"seed": None})


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 0},
        {"kv_cache_bytes": 0},
        {"gpu_memory_utilization": 0.0},
        {"max_lora_rank": 7},
        {"hang_timeout_s": 0.0},
        {"max_loras": 9, "max_cpu_loras": 8},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Options(**wrong)


def test_the_section_of_the_configuration_makes_an_engine() -> None:
    settings = EnginesConfig.model_validate({"vllm": {"kv_cache_bytes": "64MiB", "max_loras": 2}}).settings("vllm")
    spec = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", size_bytes=1000)
    engine = VLLMEngine(**settings)
    assert engine.footprint(spec) == 1000
    assert engine.slot_bytes(engine.shape(spec)) - 64 * 2**20 in (0, PROCESS_BYTES)
    assert isinstance(engine, SlotEngine)


def test_experts_of_one_architecture_and_size_have_one_shape() -> None:
    def shape(name: str, **fields: Any) -> ShapeKey:
        stated: dict[str, Any] = {"size_bytes": 1000, "architecture": "LlamaForCausalLM"} | fields
        return VLLMEngine(kv_cache_bytes=1).shape(ExpertSpec(name=name, kind=Kind.MODEL, source=f"/{name}", **stated))

    assert shape("a") == shape("b")
    assert len({shape("a"), shape("b", size_bytes=999), shape("c", architecture="Qwen3ForCausalLM")}) == 3
    assert shape("a", architecture=None) != shape("b", architecture=None)


def test_weights_in_another_type_take_more_memory() -> None:
    spec = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", size_bytes=1000, parameters_total=500)
    sizes = {dtype: VLLMEngine(dtype=dtype, kv_cache_bytes=1).footprint(spec) for dtype in ("auto", "float32")}
    assert sizes["float32"] - sizes["auto"] == 1000
    with pytest.raises(WeightsError, match="register it again"):
        VLLMEngine(kv_cache_bytes=1).footprint(ExpertSpec(name="m", kind=Kind.MODEL, source="/m"))


def test_quantised_weights_take_what_their_files_do_and_share_no_slot_with_others() -> None:
    def spec(**fields: Any) -> ExpertSpec:
        stated: dict[str, Any] = {"size_bytes": 1000, "parameters_total": 2000, "architecture": "LlamaForCausalLM"}
        return ExpertSpec(**{"name": "m", "kind": Kind.MODEL, "source": "/m"} | stated | fields)

    engine, in_fp32 = VLLMEngine(kv_cache_bytes=1), VLLMEngine(kv_cache_bytes=1, dtype="float32")
    packed, gguf = spec(quantization="awq"), spec(quantization="gguf-q4_1")
    assert {each.footprint(packed) for each in (engine, in_fp32)} == {1000}
    assert [each.footprint(gguf) for each in (engine, in_fp32)] == [4000, 8000]  # unpacked
    assert engine.footprint(spec(source="/m.gguf")) == 4000  # registered before its type was read
    assert engine.shape(packed).quantization == "awq" and "awq" in str(engine.shape(packed))
    assert engine.shape(gguf).quantization is None
    assert len({engine.shape(packed), engine.shape(spec()), engine.shape(spec(quantization="gptq"))}) == 3


@pytest.mark.parametrize(("cpu", "size_bytes"), [(False, 501), (True, 1001)])
def test_gpus_share_the_weights_of_a_model(cpu: bool, size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.vllm.engine.on_cpu", lambda: cpu)
    engine = VLLMEngine(kv_cache_bytes=1, tensor_parallel_size=2)
    assert engine.footprint(ExpertSpec(name="m", kind=Kind.MODEL, source="/m", size_bytes=1001)) == size_bytes


def test_compilation_is_off_in_eager_mode_on_a_cpu_only() -> None:
    assert environment(eager_on_cpu=True)["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in environment(eager_on_cpu=False)


def test_a_folder_is_checked_before_vllm_reads_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        check_folder("m", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        check_folder("m", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    check_folder("m", tmp_path)
    (tmp_path / "config.json").write_text('{"_attn_implementation": "some/kernel"}')
    with pytest.raises(WeightsError, match="code from a repository"):
        check_folder("m", tmp_path)


def test_a_failed_start_tells_memory_from_weights() -> None:
    assert isinstance(start_error("m", ValueError("Free memory on device cuda:0 is less")), OutOfMemory)
    assert isinstance(start_error("m", RuntimeError("Engine core initialization failed")), WeightsError)


@pytest.mark.parametrize(
    ("installed", "for_cpu", "cuda", "on_cpu", "kind"),
    [
        (True, False, True, "hf", "vllm"),
        (True, False, False, "hf", "hf"),
        (True, False, False, "vllm", "hf"),  # the build for CUDA runs on no CPU
        (True, True, True, "hf", "hf"),
        (True, True, False, "vllm", "vllm"),
        (False, False, True, "hf", "hf"),
        (False, False, False, "vllm", "hf"),
    ],
)
def test_the_engine_of_weights_that_name_none(
    installed: bool, for_cpu: bool, cuda: bool, on_cpu: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe.engines.vllm.process.is_installed", lambda: installed)
    monkeypatch.setattr("coe.engines.vllm.process.on_cpu", lambda: for_cpu)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    config = Config.model_validate({"engines": {"auto_on_cpu": on_cpu}})
    weights_engine.cache_clear()
    try:
        for engine in (None, "auto"):
            spec = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", engine=engine)
            assert engine_kind(spec, on_cpu=on_cpu) == kind
            assert engine_kinds(config, Snapshot(1, {"m": spec})) == {kind}
        stated = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", engine="hf")
        assert engine_kind(stated, on_cpu=on_cpu) == "hf"
        fake = ExpertSpec(name="m", kind=Kind.MODEL, source="fake://x", engine="auto")
        assert engine_kind(fake, on_cpu=on_cpu) == "fake"
    finally:
        weights_engine.cache_clear()


@pytest.mark.parametrize(
    ("quantization", "kind"), [("compressed-tensors", "vllm"), ("awq", "vllm"), ("gguf-q4_1", "hf"), (None, "hf")]
)
def test_quantised_weights_run_on_vllm_on_a_cpu_too(
    quantization: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe.engines.vllm.process.on_cpu", lambda: True)
    spec = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", quantization=quantization)
    for installed, expected in ((True, kind), (False, "hf")):
        monkeypatch.setattr("coe.engines.vllm.process.is_installed", lambda installed=installed: installed)
        weights_engine.cache_clear()
        assert engine_kind(spec) == expected
    weights_engine.cache_clear()


async def test_a_host_serves_weights_on_a_cpu_by_the_configured_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.vllm.process.is_installed", lambda: True)
    monkeypatch.setattr("coe.engines.vllm.process.on_cpu", lambda: True)
    weights_engine.cache_clear()
    spec = ExpertSpec(name="m", kind=Kind.MODEL, source="/m", size_bytes=2000)
    try:
        for engine, footprint in (("hf", 4000), ("vllm", 2300)):
            engines = {"auto_on_cpu": engine, "vllm": {"kv_cache_bytes": 300}}
            config = Config.model_validate({"engines": engines, "host": {"budget": 10**9}})
            async with open_host(config, Snapshot(1, {"m": spec})) as host:
                assert host.footprint("m") - footprint in (0, PROCESS_BYTES)
    finally:
        weights_engine.cache_clear()


def test_without_vllm_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.engines.vllm.process.is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'composition-of-experts\[vllm\]'.*docs/vllm.md"):
        VLLMEngine().check()
