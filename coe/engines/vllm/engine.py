"""VLLMEngine: vLLM on CUDA or, with the build for CPUs, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Capabilities, ShapeKey
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.render import Renderer
from coe.engines.vllm.embedder import EmbedderSlot
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.options import Options
from coe.engines.vllm.parsers import ParserNames
from coe.engines.vllm.process import is_installed, on_cpu, require_vllm, set_environment
from coe.engines.vllm.slot import VLLMSlot
from coe.errors import WeightsError
from registry.quantization import GGUF
from registry.sources import names_gguf
from registry.spec import ExpertSpec, Kind

_ITEM_BYTES: Final = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
_POOLING: Final = "pooling"
"""Dimension of the shape of a model that returns vectors."""
PARKED_BYTES: Final = 2**30
"""Of a process that sleeps on a GPU: an estimate from vLLM's source, not measured."""
PROCESS_BYTES: Final = 2**30
"""Memory of an engine process beside weights and cache, where that is the memory of the machine."""


class VLLMEngine:
    """Serves models in engine processes that this process starts and supervises; models of one shape share one in turn.

    The arguments are those of `coe.engine_config.VLLMConfig`.
    """

    slots_per_shape: Final = 1
    capabilities: Final = Capabilities(
        streaming=True,
        adapters=True,
        tools=True,
        json_schema=True,
        logprobs=True,
        prompt_logprobs=True,
        token_prompts=True,
        sampling=True,
        embeddings=True,
        sleep=not on_cpu(),
    )

    def __init__(
        self,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.75,
        kv_cache_bytes: int | None = None,
        max_num_seqs: int = 32,
        tensor_parallel_size: int = 1,
        eager: bool | None = None,
        max_loras: int = 4,
        max_cpu_loras: int = 16,
        max_lora_rank: int = 16,
        canary: str = "exact",
        sleep: bool = True,
        hang_timeout_s: float = 300.0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._options = Options(
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            eager=eager,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
            max_lora_rank=max_lora_rank,
            canary=canary,
            sleep=sleep,
            hang_timeout_s=hang_timeout_s,
            engine_args=engine_args or {},
        )
        self._renderer = Renderer()
        self._checker = GrammarChecker()

    def check(self) -> None:
        """Raises ConfigError if this process cannot run the engine."""
        require_vllm()

    def check_expert(self, spec: ExpertSpec) -> None:
        """Raises ConfigError if vLLM, where it is installed, has no such parsers as the expert names."""
        names = ParserNames.of(spec)
        if names and is_installed():
            set_environment(self._options)
            names.check(expert=spec.name)

    def footprint(self, spec: ExpertSpec) -> int:
        """Bytes of the weights on a device; several GPUs share them.

        Raises:
            WeightsError: the spec states neither parameters nor size.
        """
        return self._weight_bytes(spec)

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        """What the spec states about the shape; the files decide whether a process can take the weights in place.

        Raises:
            WeightsError: the spec states neither parameters nor size.
        """
        dimensions = {
            "bytes": self._weight_bytes(spec),
            "parameters": spec.parameters_total or 0,
            "context": spec.context_length or 0,
        }
        if spec.kind is Kind.EMBEDDING:
            sizes = {"bytes": dimensions["bytes"], _POOLING: 1}
            return replace(ShapeKey.only(spec), dimensions=tuple(sizes.items()), dtype=self._options.dtype)
        return ShapeKey(
            architecture=spec.architecture or "",
            dimensions=tuple(dimensions.items()),
            dtype=self._options.dtype,
            quantization=_packed(spec),
            max_adapters=self._options.max_loras,
            max_adapter_rank=self._options.max_lora_rank if self._options.max_loras else 0,
            expert=None if spec.architecture else spec.ref,
        )

    def slot_bytes(self, shape: ShapeKey) -> int:
        """Bytes of the key-value cache; on a CPU also those of the process.

        On a GPU without `kv_cache_bytes`, the cache takes what the share of the memory leaves beside the weights.
        """
        cpu = on_cpu()
        cache = self._options.cache_bytes(on_cpu=cpu)
        if cache is None:
            share = int(self._options.gpu_memory_utilization * _gpu_bytes())
            return max(0, share - dict(shape.dimensions)["bytes"])
        return cache + (PROCESS_BYTES if cpu else 0)

    def parked_bytes(self, shape: ShapeKey) -> int:
        """Bytes of a process that sleeps: its CUDA context, and what vLLM keeps beside weights and cache."""
        return PARKED_BYTES

    async def open_slot(self, shape: ShapeKey) -> VLLMSlot | EmbedderSlot:
        """An empty slot; its process starts with the first expert."""
        if _POOLING in dict(shape.dimensions):
            return EmbedderSlot(shape, self._options)
        self._renderer.start()
        return VLLMSlot(shape, self._expert, sleeps=self._options.can_sleep(on_cpu=on_cpu()))

    def _expert(self, spec: ExpertSpec, path: Path) -> VLLMExpert:
        return VLLMExpert(spec, path, self._options, self._renderer, self._checker)

    def _weight_bytes(self, spec: ExpertSpec) -> int:
        devices = 1 if on_cpu() else self._options.tensor_parallel_size
        return -(-self._all_weight_bytes(spec) // devices)

    def _all_weight_bytes(self, spec: ExpertSpec) -> int:
        """Packed weights take what their files do, whatever the dtype; those of a GGUF file are unpacked before."""
        as_files = _packed(spec) is not None or (self._options.dtype == "auto" and not _unpacked(spec))
        if as_files and spec.size_bytes is not None:
            return spec.size_bytes
        if spec.parameters_total is not None:
            return spec.parameters_total * _ITEM_BYTES.get(self._options.dtype, 2)
        if spec.size_bytes is not None:
            return spec.size_bytes * _ITEM_BYTES.get(self._options.dtype, 2) // 2
        raise WeightsError(f"the size of {spec.name!r} is not known: register it again, so that its files are read")


def _packed(spec: ExpertSpec) -> str | None:
    """The method of weights that stay quantised in memory."""
    return None if _unpacked(spec) else spec.quantization


def _unpacked(spec: ExpertSpec) -> bool:
    return (spec.quantization or "").startswith(GGUF) or names_gguf(spec.source)


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0
