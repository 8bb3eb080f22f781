"""The section `engines` of a configuration: settings of each engine (`coe.config` has the whole tree)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

from registry.plugins import Plugins


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HFConfig(Section):
    """The transformers engine, for models and adapters with weights on this machine."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes CUDA, else MPS, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights; `auto` takes bfloat16 where the device has it."""
    max_batch: Annotated[int, Field(ge=1)] = 32
    """Most requests that one model generates for at once."""
    max_adapters: Annotated[int, Field(ge=1)] = 16
    """Most adapters that stay loaded on one base."""
    prefill_tokens: Annotated[int, Field(ge=1)] = 256
    """Most tokens of new prompts that a running batch reads between two tokens of its answers."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Compute threads of the process; null leaves PyTorch's own choice."""
    host_bytes: ByteSize | None = None
    """Most bytes of weights kept in memory of the host beside those that compute, such as "32GiB": an expert returns
    from there without a read from disk. null takes a quarter of the free memory beside an accelerator, and none on a
    CPU, where the system's page cache does the same."""


class VLLMConfig(Section):
    """The vLLM engine, for models and adapters with weights on this machine; each model has a process of its own."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights; `auto` takes that of the files."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of prompt and answer together; null takes the model's context, or what of it fits the key-value
    cache."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of a GPU's memory for the weights and the key-value cache of one model."""
    kv_cache_bytes: ByteSize | None = None
    """Bytes of the key-value cache of one model; null takes the rest of the GPU's share, and 1 GiB on a CPU."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 32
    """Most requests that one model generates for at once."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share the weights of one model."""
    eager: bool | None = None
    """Run without compilation and CUDA graphs: a faster start, slower answers; null does so on a CPU."""
    max_loras: Annotated[int, Field(ge=0)] = 4
    """Most different adapters in one batch; 0 serves no adapters."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 16
    """Most adapters that stay loaded on one base."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Highest rank of an adapter; each adapter in a batch takes the memory of this rank."""
    canary: Literal["exact", "tolerant", "off"] = "exact"
    """How the answer to a fixed prompt is compared with that of the first load, after each load: `exact`, on the same
    hardware and versions; `tolerant`, on any, where near-ties may differ. Another answer quarantines the expert."""
    sleep: bool = True
    """Load models so that a process can free the memory of the GPU and stay (vLLM's sleep mode); a CPU ignores it."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a response after which an engine process counts as hung: it is killed and started again. It must
    be more than a step of the model takes with a long prompt."""
    engine_args: dict[str, Any] = {}
    """Further arguments of `vllm serve`, with underscores, such as `{max_num_batched_tokens: 8192}`."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.max_loras > self.max_cpu_loras:
            raise ValueError(f"max_loras {self.max_loras} is more than max_cpu_loras {self.max_cpu_loras}")
        return self


class RemoteConfig(Section):
    """The engine of experts behind OpenAI-compatible endpoints."""

    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without any byte from the endpoint before a request fails."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further attempts after a failure that may pass; only before the first token of an answer. Of several endpoints
    each is tried once, even if these are more."""
    breaker_failures: Annotated[int, Field(ge=0)] = 5
    """Requests that fail at an endpoint in a row after which it gets no more for a while; 0: never."""
    breaker_open_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Seconds of that while, after which one request shows whether the endpoint answers again; twice as long after each
    one that fails, up to 60 s."""


class CommandConfig(Section):
    """The engine of experts whose source is a command: servers that are started on demand (docs/lifecycle.md)."""

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without any byte of an answer before a request fails."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without an answer to a health check, or a piece of an answer to a request, after which a server is killed
    and started again. It must be more than a long prompt takes on a server that answers one request at a time."""


class FakeConfig(Section):
    """Experts without weights, for tests: `fake://echo` repeats the question, `fake://upper` does so in capitals,
    `fake://script?paris=France&default=no` answers by the first key that the prompt has, `fake://fail` fails
    (`fake://fail?at=load`: at its load). State `size_bytes` and `context_length` of such an expert."""

    token_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds for each token."""
    load_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds for each load."""
    capacity: Annotated[int, Field(ge=1)] = 8
    """Most requests that one expert answers at once."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Slots that the experts of one architecture take turns in, as on an engine of one process; null gives each expert
    its own."""
    slot_bytes: ByteSize = ByteSize(0)
    """Bytes of a slot beside the `size_bytes` of its expert."""
    parked_bytes: ByteSize | None = None
    """Bytes of a slot that is parked; null parks none."""
    host_bytes: ByteSize = ByteSize(0)
    """Most bytes of copies in host memory, from which experts that share slots load in no time."""


def _installed_engine(name: str) -> str:
    if name not in Plugins("coe.engines", "engine", {}):
        raise PydanticKnownError("extra_forbidden")
    return name


class EnginesConfig(Section):
    """Settings of each engine.

    An engine of a plug-in has a section under its name (or `module:Class`): the arguments of its class.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_installed_engine)], dict[str, Any]] = Field(init=False)

    auto_on_cpu: Literal["hf", "vllm"] = "hf"
    """The engine of weights on a CPU for experts that name none (`engine: auto`), where vLLM's build for CPUs is
    installed. vLLM answers many requests at once faster, but starts and serves adapters slower: docs/vllm.md names the
    measurement that decides."""
    hf: HFConfig = HFConfig()
    """The transformers engine."""
    remote: RemoteConfig = RemoteConfig()
    """Remote endpoints."""
    vllm: VLLMConfig = VLLMConfig()
    """The vLLM engine."""
    command: CommandConfig = CommandConfig()
    """Servers that are started on demand."""
    fake: FakeConfig = FakeConfig()
    """Experts without weights."""

    def settings(self, kind: str) -> dict[str, Any]:
        """The section of an engine, as its constructor's arguments; empty where it has none."""
        section = getattr(self, kind) if kind in type(self).model_fields else None
        if isinstance(section, BaseModel):
            return section.model_dump()
        return dict((self.model_extra or {}).get(kind, {}))
