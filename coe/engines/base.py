"""The protocols of an engine: load weights, generate, free the memory; slots that serve many experts in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from coe.types import Chunk, GenerateRequest, Wants
from registry.spec import ExpertSpec


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter for a resident base: its spec and the folder of its files."""

    spec: ExpertSpec
    path: Path

    def key(self) -> str:
        """Identity of its weights: its digest; without one, the folder and the times of its files, which are read."""
        if self.spec.digest:
            return self.spec.digest
        files = sorted(p for p in self.path.glob("*") if p.is_file())
        stamps = ",".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p, s in ((p, p.stat()) for p in files))
        return f"{self.path}:{stamps}"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do, whatever expert it serves. Read before any expert is scored, and before a call runs.

    Attributes:
        streaming: text comes in chunks, as it is generated.
        adapters: LoRA adapters on a resident base, mixed in a batch.
        tools: tool calls. vision: image parts of messages. Both only for experts that state them, too.
        json_schema: output constrained to a JSON schema.
        logprobs, prompt_logprobs: log-probabilities of generated tokens, and of the prompt's.
        token_prompts: prompts as token ids.
        sampling: the options of `coe.sampling.SamplingOptions`.
        embeddings: vectors of texts, by experts of kind `embedding`.
        latent: hidden states, for compositions that exchange them.
        sleep: slots can be parked: weights leave the device while the engine process stays (`ParkingEngine`).
    """

    streaming: bool = False
    adapters: bool = False
    tools: bool = False
    vision: bool = False
    json_schema: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_prompts: bool = False
    sampling: bool = False
    embeddings: bool = False
    latent: bool = False
    sleep: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The capabilities that it has."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name))

    def serves(self, wants: Wants) -> bool:
        """Whether a call can have such a result; every engine generates text."""
        return wants == "text" or _NEEDED[wants] in self.names


_NEEDED: Final[Mapping[str, str]] = {"latent": "latent", "scores": "prompt_logprobs", "embedding": "embeddings"}


class Expert(Protocol):
    """Resident weights that generate.

    capacity: number of concurrent requests that the engine batches efficiently; the scheduler admits no more. Requests
    with different adapters share a batch. Closing the iterator (`aclose()`) cancels the generation and frees its place
    in the batch.

    The optional attribute `ahead` (0 without it) is the number of requests beyond `capacity` that the engine takes and
    keeps waiting, so that one of them starts at the step at which another ends.

    The optional method `unhealthy() -> str | None` returns, at once, why the expert does not answer now (such as that
    its process starts again), and None if it does. Requests still go to it; other hosts are preferred meanwhile.

    The optional method `memory_bytes() -> int | None` returns, at once, the bytes that its weights are measured to take
    now; None: `Engine.footprint` holds. The budget counts them from then on.
    """

    spec: ExpertSpec
    capacity: int

    def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield chunks; the last one carries `finish_reason` and `usage`.

        Raises:
            ContextLengthExceeded: prompt and answer exceed the context.
            WeightsError: the adapter does not fit this base.
            EngineError: any other failure of the engine.
        """
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A leased member of a composed expert: resident weights, and the adapter if the member is one."""

    expert: Expert
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class ShapeKey:
    """What experts must have in common to serve from one slot in turn. Equal keys: one process takes either's weights.

    Attributes:
        architecture: class of the model, such as `LlamaForCausalLM`.
        dimensions: (name, size) pairs, such as `("hidden_size", 576)`, in a fixed order.
        vocabulary: number of tokens; None if not known.
        dtype: type of the weights in memory, such as `bfloat16`.
        quantization: method of the checkpoint, such as `awq`; None if there is none.
        max_adapters, max_adapter_rank: limits of the adapters of a batch; 0 without adapters.
        expert: the one expert (`name@version`) that such a slot serves; None: any of this shape.
    """

    architecture: str = ""
    dimensions: tuple[tuple[str, int], ...] = ()
    vocabulary: int | None = None
    dtype: str = ""
    quantization: str | None = None
    max_adapters: int = 0
    max_adapter_rank: int = 0
    expert: str | None = None

    @classmethod
    def only(cls, spec: ExpertSpec) -> ShapeKey:
        """The shape of an expert that shares its slot with no other."""
        return cls(architecture=spec.architecture or "", expert=spec.ref)

    def __str__(self) -> str:
        """Such as `LlamaForCausalLM hidden_size=576 vocabulary=49152 bfloat16 awq adapters=4 rank=16`."""
        sizes = [f"{name}={size}" for name, size in self.dimensions]
        vocabulary = [] if self.vocabulary is None else [f"vocabulary={self.vocabulary}"]
        adapters = [f"adapters={self.max_adapters}", f"rank={self.max_adapter_rank}"] if self.max_adapters else []
        only = [] if self.expert is None else [f"only {self.expert}"]
        words = [self.architecture, *sizes, *vocabulary, self.dtype, self.quantization or "", *adapters, *only]
        return " ".join(filter(None, words))


class Slot(Protocol):
    """Room of one shape in a live engine: a process with its key-value cache and staging, and one expert's weights.

    The Host calls one method at a time, and none of `switch`, `park` and `close` while a request uses the expert.

    Attributes:
        shape: the shape that it was opened for.
    """

    shape: ShapeKey

    @property
    def expert(self) -> Expert | None:
        """What it serves now; None while it is empty. An `Expert` that was switched out is not used again."""
        ...

    async def switch(self, spec: ExpertSpec, path: Path) -> Expert:
        """Replace the weights by those of `spec`, whose verified files are at `path`; a slot takes any of its shape.

        Running generations end first (drain). After an error or a cancellation, `expert` is the former expert, which
        goes on serving, or None. An empty slot can be switched again; if that fails, too, the Host closes it.

        Raises:
            WeightsError, OutOfMemory: as `LoadingEngine.load`.
            EngineError: the engine failed.
        """
        ...

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """Bring the weights of `spec` closer for a later switch; generations go on.

        A `CopyingEngine` reads a copy, if that fits its budget. Any other one stays within the bytes of `slot_bytes`,
        or does nothing.

        Returns:
            Bytes of the copy that is kept now; 0: none is.
        """
        ...

    async def park(self) -> bool:
        """Free the memory of weights and key-value cache on the device, and keep the process; `expert` is None then.

        Returns:
            Whether the process stays, with the bytes of `ParkingEngine.parked_bytes`; False: nothing is left, as after
            `close`.
        """
        ...

    async def unpark(self) -> None:
        """Take the memory of the device again; `switch` does so, too. `expert` is None."""
        ...

    async def close(self) -> None:
        """End the process and free all memory. Weights are read-only: nothing is written. Closing twice is harmless."""
        ...


class Engine(Protocol):
    """What every engine states: what it can do, and what its experts take.

    It is a `LoadingEngine`, whose experts have one slot each, or a `SlotEngine`, whose experts share slots. The
    optional class attribute `weights = False` states that its experts take no memory in this process
    (`coe.engines.holds_weights`). The optional method `check()` raises ConfigError if this process cannot run the
    engine, such as for lack of a package; it is called when a host starts. The optional method `check_expert(spec)`
    raises ConfigError for fields of an expert that the engine cannot use; `coe config check` calls it.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this kind of engine can do: a class attribute, known without loading anything."""
        ...

    def footprint(self, spec: ExpertSpec) -> int:
        """Upper estimate of the bytes of the expert's weights while resident, known before loading."""
        ...


class LoadingEngine(Engine, Protocol):
    """Loads a spec and its files as a resident Expert. `coe.engines.slots.with_slots` makes slots of it."""

    async def load(self, spec: ExpertSpec, path: Path) -> Expert:
        """Load the weights into memory. Raises WeightsError or OutOfMemory."""
        ...

    async def unload(self, expert: Expert) -> None:
        """Free the memory. Weights are read-only: nothing is written."""
        ...


@runtime_checkable
class SlotEngine(Engine, Protocol):
    """Serves experts from slots, each of one shape: one process takes the weights of many experts in turn."""

    @property
    def slots_per_shape(self) -> int:
        """Most slots of one shape at a time, at least 1: a class attribute, or set by the constructor.

        The experts of a shape take turns in them, even if the budget has room for another slot.
        """
        ...

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        """The shape of the expert, from its spec alone: known before its files are located. Raises WeightsError."""
        ...

    def slot_bytes(self, shape: ShapeKey) -> int:
        """Upper estimate of the bytes of an open slot without the weights: process, key-value cache, staging."""
        ...

    async def open_slot(self, shape: ShapeKey) -> Slot:
        """Open an empty slot. Cancelled or failed, it leaves nothing behind. Raises OutOfMemory or EngineError."""
        ...


@runtime_checkable
class ParkingEngine(SlotEngine, Protocol):
    """A SlotEngine with the capability `sleep`: its slots can be parked."""

    def parked_bytes(self, shape: ShapeKey) -> int:
        """Upper estimate of the bytes of a parked slot."""
        ...


@runtime_checkable
class CopyingEngine(SlotEngine, Protocol):
    """A SlotEngine that keeps read-only copies of weights in host memory, from which a switch needs no read from disk.

    `Slot.prefetch` reads them; which ones stay is the cache's decision. A copy whose files have changed is not used.
    """

    def copy_budget_bytes(self) -> int:
        """Most bytes of all copies, which the engine itself never exceeds either."""
        ...

    def copy_bytes(self, spec: ExpertSpec) -> int:
        """Bytes of a copy, as far as known before its files are read; 0: none is kept of such an expert."""
        ...

    def has_copy(self, spec: ExpertSpec) -> bool:
        """Whether there is a copy; the engine drops one whose files have changed by itself."""
        ...

    def drop_copy(self, spec: ExpertSpec) -> None:
        """Free the copy, at once; nothing happens without one."""
        ...


@runtime_checkable
class ComposedEngine(Protocol):
    """An engine that also serves composed experts (`registry.spec.COMPOSED_ARCHITECTURES`)."""

    def compose(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> Expert:
        """An expert made of leased members; it is used for one request.

        Args:
            members: by name; of a staged architecture (`ExpertSpec.is_staged`) the first one only.
            path: the folder of its artifact; `None` without one.

        Raises:
            Unsupported: a member is served by an engine that cannot take part.
            WeightsError: the artifact is damaged, or does not fit the members.
        """
        ...
