"""The protocols of an engine: load weights, generate, free the memory."""

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
        embeddings: a vector of a text.
        latent: hidden states, for compositions that exchange them.
        sleep: weights leave the device while the engine process stays.
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


class Engine(Protocol):
    """Loads a spec and its files as a resident Expert.

    The optional class attribute `weights = False` states that its experts take no memory in this process
    (`coe.engines.holds_weights`).
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this kind of engine can do: a class attribute, known without loading anything."""
        ...

    def footprint(self, spec: ExpertSpec) -> int:
        """Upper estimate of the bytes that the expert takes while resident, known before loading."""
        ...

    async def load(self, spec: ExpertSpec, path: Path) -> Expert:
        """Load the weights into memory. Raises WeightsError or OutOfMemory."""
        ...

    async def unload(self, expert: Expert) -> None:
        """Free the memory. Weights are read-only: nothing is written."""
        ...


@runtime_checkable
class ComposedEngine(Protocol):
    """An engine that also serves composed experts (`registry.spec.COMPOSED_ARCHITECTURES`)."""

    def compose(self, spec: ExpertSpec, members: Mapping[str, Member]) -> Expert:
        """An expert made of leased members, by name; it is used for one request, and loads nothing."""
        ...
