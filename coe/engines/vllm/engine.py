"""VLLMEngine: vLLM on CUDA or, with the build for CPUs, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Capabilities, Expert
from coe.engines.hf.constrained.checker import GrammarChecker
from coe.engines.render import Renderer
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import on_cpu, require_vllm
from coe.errors import WeightsError
from registry.spec import ExpertSpec

_ITEM_BYTES: Final = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
PROCESS_BYTES: Final = 2**30
"""Memory of an engine process beside weights and cache, where that is the memory of the machine."""


class VLLMEngine:
    """Serves each model in an engine process of its own, which this process starts and supervises.

    The arguments are those of `coe.config.VLLMConfig`.
    """

    capabilities: Final = Capabilities(
        streaming=True,
        adapters=True,
        tools=True,
        json_schema=True,
        logprobs=True,
        prompt_logprobs=True,
        token_prompts=True,
        sampling=True,
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
            engine_args=engine_args or {},
        )
        self._renderer = Renderer()
        self._checker = GrammarChecker()

    def check(self) -> None:
        """Raises ConfigError if this process cannot run the engine."""
        require_vllm()

    def footprint(self, spec: ExpertSpec) -> int:
        """Bytes of the weights and the key-value cache; on a CPU also those of the engine process.

        On a GPU without `kv_cache_bytes`, the cache takes what the share of the memory leaves beside the weights: then
        it is that share.

        Raises:
            WeightsError: the spec states neither parameters nor size.
        """
        cpu = on_cpu()
        weights = self._weight_bytes(spec)
        cache = self._options.cache_bytes(on_cpu=cpu)
        if cache is None:
            return max(weights, int(self._options.gpu_memory_utilization * _gpu_bytes()))
        return weights + cache + (PROCESS_BYTES if cpu else 0)

    def _weight_bytes(self, spec: ExpertSpec) -> int:
        if self._options.dtype == "auto" and spec.size_bytes is not None:
            return spec.size_bytes
        if spec.parameters_total is not None:
            return spec.parameters_total * _ITEM_BYTES.get(self._options.dtype, 2)
        if spec.size_bytes is not None:
            return spec.size_bytes * _ITEM_BYTES.get(self._options.dtype, 2) // 2
        raise WeightsError(f"the size of {spec.name!r} is not known: register it again, so that its files are read")

    async def load(self, spec: ExpertSpec, path: Path) -> VLLMExpert:
        """Start vLLM for the model in `path`. Raises ConfigError, WeightsError or OutOfMemory."""
        self._renderer.start()
        expert = VLLMExpert(spec, path, self._options, self._renderer, self._checker)
        await expert.open()
        return expert

    async def unload(self, expert: Expert) -> None:
        """End the engine process and wait until it is gone."""
        if not isinstance(expert, VLLMExpert):
            raise TypeError(f"{expert!r} was not loaded by this engine")
        await expert.close()


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0
