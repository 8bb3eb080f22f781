"""The whole configuration of a service in one tree, validated once, at the edge.

    registry: sqlite:////var/lib/coe/registry.db     # or experts: [experts.yaml], for a registry in memory
    host: {budget: 8GiB, pins: [general]}
    policies:
      default: {router: ./router, composition: single, fallback: general}
    serve: {port: 8000, pools: [{budget: 8GiB}]}     # `coe serve`; everything has a default

Relative paths are relative to the file that names them. Secrets are never in here: specs name environment variables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from coe.errors import ConfigError
from registry.documents import load_document, validate
from registry.errors import InvalidSpec
from registry.plugins import Plugins
from registry.sources import local_path
from registry.storage import coe_home
from routers.errors import InvalidSettings
from routers.selectors import Selector, build_selector


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HFConfig(_Section):
    """The transformers engine. `auto` takes CUDA, else MPS, else the CPU; bf16 wherever the device has it."""

    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_batch: Annotated[int, Field(ge=1)] = 32
    max_adapters: Annotated[int, Field(ge=1)] = 16
    threads: Annotated[int, Field(ge=1)] | None = None


class RemoteConfig(_Section):
    """Remote OpenAI-compatible endpoints: timeouts in seconds; retries happen only before the first token."""

    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 2


class FakeConfig(_Section):
    """Experts without weights (`source: fake://...`): how long they take, and how many requests one answers at once."""

    token_delay_s: Annotated[float, Field(ge=0)] = 0.0
    load_delay_s: Annotated[float, Field(ge=0)] = 0.0
    capacity: Annotated[int, Field(ge=1)] = 8


def _installed_engine(name: str) -> str:
    if name not in Plugins("coe.engines", "engine", {}):
        raise PydanticKnownError("extra_forbidden")
    return name


class EnginesConfig(_Section):
    """Settings of each engine.

    An engine of a plug-in has a section under its name (or `module:Class`): the arguments of its class.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_installed_engine)], dict[str, Any]] = Field(init=False)

    hf: HFConfig = HFConfig()
    remote: RemoteConfig = RemoteConfig()
    fake: FakeConfig = FakeConfig()

    def settings(self, kind: str) -> dict[str, Any]:
        """The section of an engine, as its constructor's arguments; empty where it has none."""
        if kind in type(self).model_fields:
            section: BaseModel = getattr(self, kind)
            return section.model_dump()
        return dict((self.model_extra or {}).get(kind, {}))


class HostConfig(_Section):
    """One process that holds weights.

    budget: bytes that resident experts may take ("8GiB"); None takes 80% of what is free on the device at the start.
    pins: experts that stay resident once loaded. aging_s: seconds a request may be passed over for resident experts.
    """

    budget: ByteSize | None = None
    pins: tuple[str, ...] = ()
    aging_s: Annotated[float, Field(gt=0)] = 10.0
    max_waiting: Annotated[int, Field(ge=1)] = 10_000


class ReplicasConfig(_Section):
    """Bounds of autoscaling: a replica is added while each has more than `target` requests, and taken away below."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    target: Annotated[float, Field(gt=0)] = 16.0

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class ProcessConfig(_Section):
    """What Ray gives each process of a kind: fractions of a CPU are for placement, `threads` bound what computes."""

    replicas: ReplicasConfig = ReplicasConfig()
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Annotated[int, Field(ge=1)] = 1

    @property
    def environment(self) -> dict[str, str]:
        """What such a process must find in its environment. Threads that wait must not hold the cores they wait on:
        two processes with two spinning threads each on two cores are fifty times slower than one."""
        return {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class HostPoolConfig(ProcessConfig):
    """A pool of equal processes that hold weights.

    experts: those it serves; all of the registry where it is left out. budget, pins: as in `host`, for each process.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "hosts"
    experts: tuple[str, ...] | None = None
    budget: ByteSize | None = None
    pins: tuple[str, ...] | None = None


class DecisionLogConfig(_Section):
    """What was decided, a line a request. Files of `max_bytes` each, the newest `keep` of each gateway process.

    folder: `home://logs` is under `$COE_HOME`; null writes no log. texts: also what was asked, without which a replay
    starts from the router's estimate.
    """

    folder: Path | None = Field(default_factory=lambda: coe_home() / "logs" / "decisions")
    max_bytes: ByteSize = ByteSize(64 * 2**20)
    keep: Annotated[int, Field(ge=1)] = 16
    texts: bool = False

    @field_validator("folder", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)


class ServeConfig(_Section):
    """The endpoint of `coe serve`.

    ray: address of a Ray cluster; a Ray of its own on this machine where it is left out.
    deadline_s: most seconds for a request; a request's own may be shorter. max_in_flight: requests that a gateway
    process takes on; more get 429. watch_s: how often the registry and the files of the configuration are looked at
    for changes.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    ray: str | None = None
    gateway: ProcessConfig = ProcessConfig()
    pools: tuple[HostPoolConfig, ...] = (HostPoolConfig(),)
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    max_in_flight: Annotated[int, Field(ge=1)] = 1024
    max_body_bytes: ByteSize = ByteSize(4 * 2**20)
    watch_s: Annotated[float, Field(gt=0)] = 2.0
    log: DecisionLogConfig = DecisionLogConfig()

    @model_validator(mode="after")
    def _pools_have_names(self) -> Self:
        names = [pool.name for pool in self.pools]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"pools need names of their own, and there must be one; got {names}")
        return self


class BatchConfig(_Section):
    """The processes of `coe batch`. ray: as in `serve`; hosts: equal processes that hold weights.

    part_rows: rows that are written, and resumed, together.
    """

    ray: str | None = None
    hosts: ProcessConfig = ProcessConfig()
    part_rows: Annotated[int, Field(ge=1)] = 4096


class CompositionConfig(BaseModel):
    """What is done with the chosen experts: a name, or `{kind: cascade, confidence: 0.8}` with settings of its own.

    prior: a path, as all paths read against the folder of the file that names it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str = "single"

    @property
    def settings(self) -> dict[str, Any]:
        """All but the kind; `coe.compose.build_composition` checks them."""
        return dict(self.model_extra or {})

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it is read from beside the configuration."""
        prior = self.settings.get("prior")
        return (Path(prior),) if isinstance(prior, str) else ()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, dict) and isinstance(value.get("prior"), str):
            return {**value, "prior": str(_resolve(value["prior"], info))}
        return {"kind": value} if isinstance(value, str) else value


class PolicyConfig(_Section):
    """A named way to answer, addressed as `model: "coe/<name>"`.

    router: folder of a trained router (`coe router train`). plugins: modules that the folder may name as
    `module:Class` and that are then imported (docs/plugins.md). expert: always this one, in place of a router.
    select: how many experts a decision holds, and in which order: `best`, or `{kind: dynamic, p: 0.9, k: 5}`
    (`routers.selectors`). k: most of them; alone it is short for `{kind: top-k, k: ...}`.
    composition: what they do (`coe.compose`).
    cost_weight: quality (score in [0, 1]) given up per USD; left out, the one that was solved for the router in
    training, else 0. latency_weight: quality given up per second of loading. fallback: the expert that answers when the
    chosen one fails before its first token.
    """

    router: Path | None = None
    plugins: tuple[str, ...] = ()
    expert: str | None = None
    composition: CompositionConfig = CompositionConfig()
    select: str | dict[str, Any] | None = None
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    latency_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    k: Annotated[int, Field(ge=1)] | None = None
    fallback: str | None = None

    @field_validator("router", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)

    @property
    def selector(self) -> Selector:
        """`select` and `k` as one value.

        Raises:
            InvalidSettings: no such selector, or settings that it cannot use; a PolicyConfig that exists has none.
        """
        if self.select is None:
            return build_selector({"kind": "top-k", "k": self.k or 1})
        if self.k is not None and isinstance(self.select, dict) and "k" in self.select:
            raise InvalidSettings("k is given twice: in the policy and in its `select`")
        return build_selector(self.select, **({} if self.k is None else {"k": self.k}))

    @model_validator(mode="after")
    def _selects(self) -> Self:
        try:
            _ = self.selector
        except InvalidSettings as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _router_or_expert(self) -> Self:
        if (self.router is None) == (self.expert is None):
            raise ValueError("give either `router` (a folder written by `coe router train`) or `expert`, not both")
        return self


class Config(_Section):
    """Everything a service is told. See the module's docstring for an example."""

    registry: str | None = None
    experts: tuple[Path, ...] = ()
    engines: EnginesConfig = EnginesConfig()
    host: HostConfig = HostConfig()
    policies: dict[str, PolicyConfig] = {}
    default_policy: str = "default"
    serve: ServeConfig = ServeConfig()
    batch: BatchConfig = BatchConfig()

    @field_validator("experts", mode="before")
    @classmethod
    def _experts_from_here(cls, paths: object, info: ValidationInfo) -> object:
        return [_resolve(path, info) for path in paths] if isinstance(paths, list | tuple) else paths

    @model_validator(mode="after")
    def _default_exists(self) -> Self:
        if self.policies and self.default_policy not in self.policies:
            raise ValueError(
                f"default_policy {self.default_policy!r} is not among the policies {sorted(self.policies)}"
            )
        if self.registry and self.experts:
            raise ValueError("give either `registry` (a database URL) or `experts` (files), not both")
        return self


def load_config(path: Path | str) -> Config:
    """Read and validate a configuration file.

    Raises:
        ConfigError: every problem at once, each with its line and field.
    """
    try:
        return validate(load_document(Path(path)), Config)
    except InvalidSpec as error:
        raise ConfigError(str(error)) from error


def _resolve(path: object, info: ValidationInfo) -> object:
    """A path, read against the folder of the file that says it; anything else is left for pydantic to refuse."""
    folder = (info.context or {}).get("folder", Path.cwd())
    return local_path(os.fspath(path), folder) if isinstance(path, str | Path) else path
