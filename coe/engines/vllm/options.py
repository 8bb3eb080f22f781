"""The engine's options as arguments of vLLM's AsyncEngineArgs. Pure: vLLM is not imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from coe.errors import ConfigError

ENGINE_ARGS: Final = "engines.vllm.engine_args"
CPU_CACHE_BYTES: Final = 2**30
"""Key-value cache on a CPU if none is configured; on a GPU the share of its memory decides."""
LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can reserve; an adapter of a lower rank fits too."""
CANARY: Final = ("exact", "tolerant", "off")
"""How the answer to a fixed prompt is compared after each load."""
_FITTING: Final = -1
"""As `max_model_len`: the model's context, or as much of it as fits the key-value cache."""
_OWN: Final[Mapping[str, str]] = {
    "dtype": "`dtype`",
    "max_model_len": "`max_model_len`",
    "gpu_memory_utilization": "`gpu_memory_utilization`",
    "kv_cache_memory_bytes": "`kv_cache_bytes`",
    "max_num_seqs": "`max_num_seqs`",
    "tensor_parallel_size": "`tensor_parallel_size`",
    "enforce_eager": "`eager`",
    "enable_sleep_mode": "`sleep`",
    "enable_lora": "`max_loras`",
    "max_loras": "`max_loras`",
    "max_cpu_loras": "`max_cpu_loras`",
    "max_lora_rank": "`max_lora_rank`",
}
"""Arguments that have an option of their own."""
_FIXED: Final = frozenset(
    {
        "model",
        "tokenizer",
        "served_model_name",
        "trust_remote_code",
        "load_format",
        "distributed_executor_backend",
        "worker_cls",
        "worker_extension_cls",
        "disable_log_stats",
        "enable_log_requests",
        "use_tqdm_on_load",
        "runner",
        "convert",
        "structured_outputs_config",
    }
)
"""Arguments that the engine depends on: other values would run code of a repository, or break what it promises."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the engine; see `coe.engine_config.VLLMConfig`. pooling: models return vectors.

    Raises:
        ConfigError: a value is out of range, or an `engine_args` entry is one of the options or cannot be changed.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.75
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 32
    tensor_parallel_size: int = 1
    eager: bool | None = None
    max_loras: int = 4
    max_cpu_loras: int = 16
    max_lora_rank: int = 16
    canary: str = "exact"
    sleep: bool = True
    hang_timeout_s: float = 300.0
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    pooling: bool = False

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_bytes", "max_num_seqs", "tensor_parallel_size", "max_cpu_loras"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
        if not self.hang_timeout_s > 0:
            raise ConfigError(f"hang_timeout_s must be more than 0, got {self.hang_timeout_s}")
        if self.max_lora_rank not in LORA_RANKS:
            raise ConfigError(
                f"max_lora_rank must be one of {', '.join(map(str, LORA_RANKS))}; got {self.max_lora_rank}"
            )
        if self.canary not in CANARY:
            raise ConfigError(f"canary must be one of {', '.join(CANARY)}; got {self.canary!r}")
        if not 0 <= self.max_loras <= self.max_cpu_loras:
            raise ConfigError(f"max_loras must lie in [0, max_cpu_loras={self.max_cpu_loras}], got {self.max_loras}")
        for name in self.engine_args:
            if name in _OWN:
                raise ConfigError(f"{ENGINE_ARGS}: {name!r} has an option of its own: set {_OWN[name]} instead")
            if name in _FIXED:
                raise ConfigError(f"{ENGINE_ARGS}: {name!r} cannot be changed: the engine depends on its value")

    def for_embeddings(self) -> Options:
        """The same for a model that returns vectors: it has no adapters, and generates nothing to check."""
        return replace(self, pooling=True, max_loras=0, canary="off")

    def runs_eagerly(self, *, on_cpu: bool) -> bool:
        """Whether models run without compilation and CUDA graphs."""
        return on_cpu if self.eager is None else self.eager

    def can_sleep(self, *, on_cpu: bool) -> bool:
        """Whether a process can free the memory of the device and stay; vLLM does nothing for this on a CPU."""
        return self.sleep and not on_cpu

    def cache_bytes(self, *, on_cpu: bool) -> int | None:
        """Bytes of the key-value cache; None if vLLM takes them from its share of the GPU."""
        return CPU_CACHE_BYTES if self.kv_cache_bytes is None and on_cpu else self.kv_cache_bytes

    def arguments(self, path: Path, name: str, *, on_cpu: bool, with_ray: bool) -> dict[str, Any]:
        """Arguments of `AsyncEngineArgs` for the model in `path`.

        Args:
            name: of the expert; in vLLM's messages.
            on_cpu: whether vLLM runs on a CPU.
            with_ray: whether this process is part of a Ray cluster, which then places tensor-parallel workers.
        """
        stated: dict[str, Any] = {
            "model": str(path),
            "tokenizer": str(path),
            "served_model_name": name,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len or _FITTING,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.runs_eagerly(on_cpu=on_cpu),
            "enable_sleep_mode": self.can_sleep(on_cpu=on_cpu),
            "kv_cache_memory_bytes": self.cache_bytes(on_cpu=on_cpu),
            "distributed_executor_backend": self._executor(with_ray=with_ray and not on_cpu),
            "worker_extension_cls": "coe.engines.vllm.worker.WorkerExtension",
            "load_format": "safetensors",  # never a pickle
            "trust_remote_code": False,
            "structured_outputs_config": {"backend": "guidance"},  # which the grammars are written and checked for
            "disable_log_stats": True,
            "enable_log_requests": False,
            "use_tqdm_on_load": False,
        }
        if not on_cpu:
            stated["gpu_memory_utilization"] = self.gpu_memory_utilization
        if self.pooling:
            stated["runner"] = "pooling"
        return stated | self._lora(on_cpu) | dict(self.engine_args)

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that Ray counts for each process of a model on several: the models of a host can share them."""
        return math.floor(1e4 * self.gpu_memory_utilization) / 1e4  # Ray counts ten-thousandths

    def _executor(self, *, with_ray: bool) -> str:
        if self.tensor_parallel_size == 1:
            return "uni"
        return "ray" if with_ray else "mp"

    def _lora(self, on_cpu: bool) -> dict[str, Any]:
        if not self.max_loras:
            return {}
        limits = {"max_loras": self.max_loras, "max_cpu_loras": self.max_cpu_loras}
        if on_cpu:
            # In a batch with adapters, vLLM's kernels for CPUs apply the last slot to requests without one (an index of
            # -1). With a slot more than there are adapters, the last one stays empty: slots are taken from the first.
            limits = {"max_loras": self.max_cpu_loras + 1, "max_cpu_loras": self.max_cpu_loras + 1}
        return {"enable_lora": True, "max_lora_rank": self.max_lora_rank, **limits}
