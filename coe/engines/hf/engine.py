"""HFEngine: transformers and peft, on CUDA, Apple's MPS or the CPU. Models of one shape take turns in slots."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Capabilities, Expert, Member, ShapeKey
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.hf import composed
from coe.engines.hf.embedder import HFEmbedder, load_embedder
from coe.engines.hf.expert import HFExpert, off_the_loop
from coe.engines.hf.load import (
    LoadedModel,
    choose_device,
    choose_dtype,
    describe_files,
    free_bytes,
    load_model,
    require_memory,
    weight_bytes,
)
from coe.engines.hf.slot import HFSlot
from coe.engines.hf.tokenizers import Tokenizers
from coe.engines.hf.weights.host_copies import HostCopies
from coe.engines.render import Renderer
from coe.errors import ConfigError, WeightsError
from registry.sources import names_gguf
from registry.spec import ExpertSpec, Kind

if TYPE_CHECKING:
    import torch

_CACHE_SHARE: Final = 0.6
"""Share of the free memory that the key-value cache of a batch may take; activations take the rest."""
_HOST_SHARE: Final = 0.25
"""Share of the free host memory that copies of weights may take beside an accelerator."""


class HFEngine:
    """Loads causal language models with transformers; LoRA adapters are loaded with requests.

    Experts of kind `embedding` are sentence-transformers models, in float32 on a CPU unless `dtype` states another one.

    Args:
        device: `auto` (CUDA, else MPS, else CPU) or a torch device.
        dtype: `auto` (bfloat16 if the hardware supports it, else float16 on an accelerator, float32 on a CPU),
            `bfloat16`, `float16` or `float32`. Only float32 gives the same answer alone and in a batch: in shorter
            types rounding depends on the batch shape, which may decide near-ties.
        max_batch: requests generated together.
        max_adapters: adapters kept on a resident base.
        prefill_tokens: most tokens of new prompts that a running batch reads between two tokens of its answers: more
            start new answers sooner, fewer let running ones pause less.
        threads: CPU threads of this whole process for torch; `None` leaves them. Use one per engine process if several
            share the cores.
        host_bytes: most bytes of weights that are kept in memory of the host beside those that compute, so that an
            expert returns without a read from disk; `None`: a quarter of the free memory with an accelerator, none on
            a CPU, where the system's page cache does the same.
        free: bytes free on a device.
    """

    slots_per_shape: Final = sys.maxsize  # as many as the budget has room for
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
        latent=True,
    )

    def __init__(
        self,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 32,
        max_adapters: int = 16,
        threads: int | None = None,
        *,
        prefill_tokens: int = 256,
        host_bytes: int | None = None,
        free: Callable[[str], int] = free_bytes,
    ) -> None:
        counts = {"max_batch": max_batch, "max_adapters": max_adapters, "prefill_tokens": prefill_tokens}
        for name, value in {**counts, "threads": threads}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._device, self._dtype = device, dtype
        self._max_batch, self._max_adapters, self._threads = max_batch, max_adapters, threads
        self._n_prefill, self._free = prefill_tokens, free
        if host_bytes is not None and host_bytes < 0:
            raise ConfigError(f"host_bytes must be at least 0, got {host_bytes}")
        self._host_bytes = host_bytes
        self._renderer = Renderer()
        self._checker = GrammarChecker()
        self._tokenizers = Tokenizers()

    @cached_property
    def copies(self) -> HostCopies:
        """The copies of weights in host memory."""
        on_cpu = choose_device(self._device) == "cpu"
        share = 0 if on_cpu else int(free_bytes("cpu") * _HOST_SHARE)
        return HostCopies(share if self._host_bytes is None else self._host_bytes, pin=not on_cpu)

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        """What the spec states about the shape; the files decide whether a model can take the weights in place."""
        if spec.kind is Kind.EMBEDDING or not (spec.architecture and spec.parameters_total):
            return ShapeKey.only(spec)
        sizes = {"parameters": spec.parameters_total, "context": spec.context_length or 0}
        return ShapeKey(architecture=spec.architecture, dimensions=tuple(sizes.items()), dtype=self._dtype)

    def slot_bytes(self, shape: ShapeKey) -> int:
        """None: there is no process, and key-value caches take the memory beside the budget."""
        return 0

    def copy_budget_bytes(self) -> int:
        """Most bytes of copies in host memory."""
        return self.copies.budget_bytes

    def copy_bytes(self, spec: ExpertSpec) -> int:
        """Bytes of the files that are read, which for GGUF are written in the engine's type; 0 for embedding models."""
        if spec.kind is Kind.EMBEDDING or not self.copies.budget_bytes:
            return 0
        return self.footprint(spec) if _is_gguf(spec) or not spec.size_bytes else spec.size_bytes

    def has_copy(self, spec: ExpertSpec) -> bool:
        """Whether there is a copy of the expert's weights."""
        return self.copies.holds(spec.ref)

    def drop_copy(self, spec: ExpertSpec) -> None:
        """Free the copy of the expert's weights."""
        self.copies.drop(spec.ref)

    async def open_slot(self, shape: ShapeKey) -> HFSlot:
        """An empty slot."""
        return HFSlot(shape, self)

    def footprint(self, spec: ExpertSpec) -> int:
        """Bytes of the weights in the engine's dtype.

        Raises:
            WeightsError: the spec states neither parameters nor size.
        """
        itemsize = self._dtype_of(spec, choose_device(self._device)).itemsize
        if spec.parameters_total is not None:
            return spec.parameters_total * itemsize
        if spec.size_bytes is not None:
            # Files hold at least two bytes a weight, except GGUF, which is unpacked from at least two bits.
            return spec.size_bytes * (itemsize * 4 if _is_gguf(spec) else itemsize // 2)
        raise WeightsError(f"the size of {spec.name!r} is not known: register it again, so that its files are read")

    async def load(self, spec: ExpertSpec, path: Path) -> HFExpert | HFEmbedder:
        """Load the model in `path`, a folder in the Hugging Face layout. Raises WeightsError or OutOfMemory."""
        if spec.kind is Kind.EMBEDDING:
            return await asyncio.to_thread(self._load_embedder, spec, path)
        return self.serve(spec, await asyncio.to_thread(self._load, spec, path))

    def serve(self, spec: ExpertSpec, loaded: LoadedModel) -> HFExpert:
        """An expert that answers with a loaded model."""
        device = str(loaded.model.device)
        return HFExpert(
            spec,
            loaded,
            max_batch=self._max_batch,
            max_adapters=self._max_adapters,
            cache_bytes=lambda n_held: int((self._free(device) + n_held) * _CACHE_SHARE),
            n_prefill=self._n_prefill,
            renderer=self._renderer,
            checker=self._checker,
        )

    def _load(self, spec: ExpertSpec, path: Path) -> LoadedModel:
        self._renderer.start()
        device, dtype = self._room_for(spec, path)
        return load_model(spec.name, path, device, dtype, self._tokenizers.of)

    def described(self, model: Any, path: Path) -> LoadedModel:
        """A model that has taken the weights of the folder in place. Blocks; raises what transformers does."""
        return describe_files(model, path, self._tokenizers.of(path))

    def _load_embedder(self, spec: ExpertSpec, path: Path) -> HFEmbedder:
        device, dtype = self._room_for(spec, path)
        return HFEmbedder(spec, load_embedder(spec.name, path, device, dtype), max_batch=self._max_batch)

    def _room_for(self, spec: ExpertSpec, path: Path) -> tuple[str, torch.dtype]:
        """Device and type of the weights. Raises OutOfMemory if they do not fit."""
        import torch

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        device = choose_device(self._device)
        dtype = self._dtype_of(spec, device)
        require_memory(spec.name, weight_bytes(path, dtype), device, self._free)
        return device, dtype

    def _dtype_of(self, spec: ExpertSpec, device: str) -> torch.dtype:
        """Vectors in a short type differ visibly, and save little on a CPU: embedding models are small."""
        exact = spec.kind is Kind.EMBEDDING and self._dtype == "auto" and device == "cpu"
        return choose_dtype("float32" if exact else self._dtype, device)

    def check_expert(self, spec: ExpertSpec) -> None:
        """Raises ConfigError for settings of a composed expert that its architecture does not take."""
        if spec.kind is Kind.COMPOSED:
            composed.check(spec)

    def compose(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> Expert:
        """A composed expert made of leased members; see `ComposedEngine.compose`."""
        return composed.compose(spec, members, path)

    async def unload(self, expert: Expert) -> None:
        """Wait for running answers, stop the worker thread and free the memory."""
        if not isinstance(expert, HFExpert | HFEmbedder):
            raise TypeError(f"{expert!r} was not loaded by this engine")
        await expert.close()
        await off_the_loop(self.free_memory)

    @staticmethod
    def free_memory() -> None:
        """Return the memory of models that are not used any more. Blocks."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()


def _is_gguf(spec: ExpertSpec) -> bool:
    """Whether the expert's files are one GGUF file, which may be inside its folder or have another name."""
    return names_gguf(spec.source) or [record.name.endswith(".safetensors") for record in spec.files] == [False]
