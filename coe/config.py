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
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

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

from coe.engine_config import EnginesConfig, Section
from coe.errors import ConfigError
from registry.documents import load_document, validate
from registry.errors import InvalidSpec
from registry.sources import local_path
from registry.storage import coe_home
from routers.conversation import Reads
from routers.errors import InvalidSettings
from routers.selectors import Selector, build_selector


class HostConfig(Section):
    """One process that holds weights."""

    budget: ByteSize | None = None
    """Bytes that resident experts may take, such as "8GiB"; null takes 80% of the memory that is free on the device at
    the start."""
    pins: tuple[str, ...] = ()
    """Experts that stay resident once they are loaded."""
    ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds without a request after which the weights of an expert that states no `ttl_s` are unloaded; null and 0
    keep them until the room is needed. Pinned experts stay."""
    parked: Annotated[int, Field(ge=0)] = 0
    """Most engine processes that stay without weights when their expert leaves, so that the next expert of their shape
    starts none; beyond, the one that was used least recently ends. Only engines with a sleep mode have any: vLLM on a
    GPU, where this has not been run yet."""
    aging_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that a request may be passed over in favour of others."""
    max_waiting: Annotated[int, Field(ge=1)] = 10_000
    """Most requests that wait; more are refused."""
    eviction: Literal["lru", "gdsf", "look-ahead"] = "look-ahead"
    """Which idle expert leaves memory when another needs its room. `lru`: the least recently used. `gdsf`: the one with
    the least requests per second * load seconds / bytes. `look-ahead`: the one that is needed last, by the waiting
    requests in their order, else by how often it was asked for of late."""


class ReplicasConfig(Section):
    """Bounds of autoscaling; a whole number in place of the section fixes the count."""

    min: Annotated[int, Field(ge=1)] = 1
    """Fewest processes."""
    max: Annotated[int, Field(ge=1)] = 1
    """Most processes."""
    target: Annotated[float, Field(gt=0)] = 16.0
    """Requests in flight per process above which one is added, and below which one is removed."""

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


def _whole_or_part(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("more than one GPU must be a whole number")
    return gpus


class ProcessConfig(Section):
    """Processes of one kind under Ray."""

    replicas: ReplicasConfig = ReplicasConfig()
    """How many processes."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs that Ray reserves for each, for placement only; fractions are allowed."""
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_whole_or_part)] | None = None
    """GPUs that Ray reserves for each: a fraction, whose processes share one, or a whole number. null takes what the
    engines of its experts use: none on a CPU; else one, or an equal share where there are more processes than GPUs."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Compute threads of each process."""

    @property
    def environment(self) -> dict[str, str]:
        """What such a process must find in its environment. Threads that wait must not hold the cores they wait on:
        two processes with two spinning threads each on two cores are fifty times slower than one. Ray would lower the
        priority of its processes by 15, so that any other program on the machine delayed their answers."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_worker_niceness": "0",
        }


class HostPoolConfig(ProcessConfig):
    """A pool of equal processes that hold weights."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "hosts"
    """Name of the pool, in messages and metrics; each pool has its own."""
    experts: tuple[str, ...] | None = None
    """Experts that the pool serves, with their bases and members; null serves all. Peers of a composed expert that
    another pool names are called there (docs/latent.md)."""
    budget: ByteSize | None = None
    """As `host.budget`, for each process; null takes that."""
    pins: tuple[str, ...] | None = None
    """As `host.pins`, for each process; null takes those that the pool serves."""


class PlacementConfig(ProcessConfig):
    """Pools that `coe serve` computes, each of one host: experts are placed by the work of each."""

    hosts: Annotated[int, Field(ge=1, le=1000)]
    """Hosts, with `host.budget` bytes for weights each."""
    log: Path | None = None
    """Decision log whose requests show the work of each expert, a file or a folder; null takes `serve.log.folder`.
    With fewer than 100 answered requests for each host the bytes of the weights are spread evenly at the start, and a
    running service moves no expert."""
    every_s: Annotated[float, Field(ge=1)] | None = None
    """Seconds after which the placement is computed again, beside the start and after every reload; null: only then."""

    @field_validator("log", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)


class DecisionLogConfig(Section):
    """The decision log: one line of JSON per request."""

    folder: Path | None = Field(default_factory=lambda: coe_home() / "logs" / "decisions")
    """Folder of the log; `home://logs` is under `$COE_HOME`; null writes no log."""
    max_bytes: ByteSize = ByteSize(64 * 2**20)
    """Bytes of one file of the log."""
    keep: Annotated[int, Field(ge=1)] = 16
    """Newest files that are kept for each gateway process."""
    texts: bool = False
    """Log the text of requests too; without it `coe replay` starts from the logged estimate and cannot route again."""

    @field_validator("folder", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)


class BrownoutConfig(Section):
    """What policies give up while a gateway is overloaded, before it answers 429 (docs/serving.md)."""

    in_flight_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of `serve.max_in_flight` at which it begins."""
    wait_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Predicted seconds of waiting for any expert at which it begins too; null: waits do not count."""
    end_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """It ends when both figures have been below this share of their thresholds for `end_after_s`."""
    end_after_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    """Seconds that the load must have been so low before it ends."""
    policies: tuple[str, ...] | None = None
    """Policies that it degrades; null: all."""
    one_expert: bool = True
    """Call one expert once: a vote has one voice, a cascade no second stage, an aggregation nothing to aggregate."""
    cost_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Least quality given up per USD: cheaper experts are chosen. null leaves the weights of policies and requests."""


class BatchesConfig(Section):
    """Files and batches of the endpoint: `/v1/files` and `/v1/batches` (docs/batch.md)."""

    folder: Path
    """Folder of the files and of the runs; all gateways of a service use the same one."""
    max_file_bytes: ByteSize = ByteSize(200 * 2**20)
    """Most bytes of an uploaded file."""
    max_files_bytes: ByteSize = ByteSize(10 * 2**30)
    """Most bytes of all files together; beyond them uploads are refused."""
    max_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    """Most requests of a batch."""
    max_waiting: Annotated[int, Field(ge=1)] = 100
    """Most batches that wait or run; more get HTTP 429."""
    at_once: Annotated[int, Field(ge=1, le=64)] = 1
    """Batches that run at a time, in all gateways together; the others wait."""
    in_flight: Annotated[int, Field(ge=1)] = 16
    """Most expert calls of a batch that are in flight; a quarter of it while the gateway has other requests."""
    keep_days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    """Days until a file, and a batch that has ended, is deleted."""

    @field_validator("folder", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)


HttpPath = Literal["direct", "haproxy", "proxy"]


def _collector(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("the base URL of a collector is like http://127.0.0.1:4318")
    if "@" in parts.netloc:
        raise ValueError("secrets are never in here: OTEL_EXPORTER_OTLP_HEADERS in the environment has credentials")
    return url


class ServeConfig(Section):
    """The endpoint of `coe serve`."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    ray: str | None = None
    """Address of a Ray cluster (`auto`: the one of this machine); null starts a Ray on this machine."""
    http: HttpPath | None = None
    """What accepts the connections of clients: `direct`, the gateways themselves; `haproxy`, Ray Serve's HAProxy, on
    Linux; or `proxy`, Ray Serve's proxy in Python. null takes `direct`, and `proxy` on a cluster that was running
    before (docs/serving.md)."""
    gateway: ProcessConfig = ProcessConfig()
    """Processes that take requests and route them."""
    pools: tuple[HostPoolConfig, ...] = (HostPoolConfig(),)
    """Processes that hold weights, by pool."""
    placement: PlacementConfig | None = None
    """In place of `pools`: the pools that `coe serve` computes from what was asked (docs/serving.md)."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Most seconds for a request; a request may ask for less."""
    max_in_flight: Annotated[int, Field(ge=1)] = 1024
    """Most requests in flight per gateway process; more get HTTP 429."""
    brownout: BrownoutConfig | None = None
    """What policies give up while a gateway is overloaded; null: nothing."""
    max_body_bytes: ByteSize = ByteSize(4 * 2**20)
    """Most bytes of a request's body; larger ones get HTTP 413."""
    max_uploads: Annotated[int, Field(ge=1)] = 1024
    """Most bodies that a gateway process reads at once; beyond them the oldest is given up with HTTP 408."""
    max_uploads_bytes: ByteSize = ByteSize(256 * 2**20)
    """Most bytes that unfinished bodies may hold in a gateway process; beyond them the oldest is given up."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Most seconds until a request's body is whole; slower ones get HTTP 408."""
    body_idle_s: Annotated[float, Field(gt=0)] = 10.0
    """Most seconds without a byte of a body that is not whole; then HTTP 408."""
    allowed_hosts: tuple[str, ...] | None = None
    """Values of the `Host` header that are served, such as `api.example.com`, `*.example.com` or `*`; others get HTTP
    403. null takes `localhost`, `host` and all IP addresses if `host` is a loopback address, else `*`."""
    keys: Literal["auto", "required"] = "auto"
    """Whether requests need an API key: `auto`, once `coe keys create` has made one; `required`, also before."""
    usage_url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the URL of a Redis server, such as `redis://HOST:6379/0`, that keeps what API keys use;
    null keeps it in the registry's database."""
    insecure: bool = False
    """Listen on an address other than 127.0.0.1 without any API key (`--insecure`)."""
    admin_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the key that admin calls (`/admin/...`, `coe load`) must send; null accepts them
    without a key from this machine only, and none with `http: haproxy`."""
    admin_sources: tuple[Literal["commands", "files", "plugins", "secrets"], ...] = ()
    """What `POST /admin/experts` accepts beside experts of the Hugging Face hub, and of endpoints without a key:
    `commands`, a source that starts a program; `files`, a path on the machines of the service; `plugins`, an engine
    that is not built in; `secrets`, an `api_key_env`, whose value is sent to the stated URL. An experts file and
    `coe registry` need no permission."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may send requests, such as `https://app.example.com`, or `*`; requests of other pages get
    HTTP 403. Programs that are not browsers send no origin."""
    ui: bool = True
    """Serve the page `/ui` (docs/ui.md). It has no data of its own: what it shows needs the keys of the endpoints."""
    watch_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two looks at the registry and the files of the configuration for changes."""
    host_silent_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds without a response to a ping after which an expert host is avoided, and its calls go to other hosts."""
    log: DecisionLogConfig = DecisionLogConfig()
    """The decision log."""
    log_format: Literal["text", "json"] = "text"
    """Lines of the logs: `text`, or `json` with the ids of request, decision, key and trace, and a line for each
    request (docs/observability.md)."""
    trace_endpoint: Annotated[str, AfterValidator(_collector)] | None = None
    """Base URL of an OpenTelemetry collector that gets traces over OTLP, such as `http://127.0.0.1:4318`; null takes
    OTEL_EXPORTER_OTLP_ENDPOINT of the environment, and records none without (docs/observability.md)."""
    batches: BatchesConfig | None = None
    """Turns on `/v1/files` and `/v1/batches`; null leaves them off."""

    @property
    def http_path(self) -> HttpPath:
        """The setting `http`, or what null stands for."""
        return self.http or ("direct" if self.ray is None else "proxy")

    @model_validator(mode="after")
    def _pools_have_names(self) -> Self:
        names = [pool.name for pool in self.pools]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"pools need names of their own, and there must be one; got {names}")
        if self.placement is not None and "pools" in self.model_fields_set:
            raise ValueError("give either `pools` or `placement`, which computes pools, not both")
        return self

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        return f"http://{host}:{self.port}/v1"


class BatchConfig(Section):
    """The processes of `coe batch`."""

    ray: str | None = None
    """Address of a Ray cluster; null starts a Ray on this machine."""
    hosts: ProcessConfig = ProcessConfig()
    """Processes that hold weights."""
    part_rows: Annotated[int, Field(ge=1)] = 4096
    """Rows that are written, and resumed, together."""


class CompositionConfig(BaseModel):
    """What is done with the chosen experts: a name, or `{kind: cascade, confidence: 0.8}` with settings of its own."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    kind: str = "single"
    """Name of the composition; its own settings stand beside it."""

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


class PolicyConfig(Section):
    """A named way to answer, addressed as `model: coe/NAME`. Needs either `router` or `expert`."""

    router: Path | None = None
    """Folder of a trained router (`coe router train`)."""
    plugins: tuple[str, ...] = ()
    """Modules that the folder may name as `module:Class`; they are imported then (docs/plugins.md)."""
    expert: str | None = None
    """Always this expert, in place of a router."""
    composition: CompositionConfig = CompositionConfig()
    """What is done with the chosen experts: a name, or a mapping with settings."""
    select: str | dict[str, Any] | None = None
    """How many experts a decision holds, and in which order: a name, or a mapping such as `{kind: dynamic, p: 0.9, k:
    5}`; null takes the `k` best."""
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Quality (a score in [0, 1]) given up per USD; null takes the one that training solved for the router, else 0."""
    latency_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Quality given up per second that loading an expert takes."""
    reads: Reads = "conversation"
    """What the router reads of a conversation: `last`, the last user turn alone; or `conversation`, also the turns
    before it, the more the less the last one can stand alone (docs/conversations.md)."""
    switch_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """Quality given up per second of prefill where another expert than that of the previous turns answers, since it
    must read the conversation again; its prompt tokens then also cost `cost_weight` per USD. 0 makes switches free.
    It has no effect where the router leaves one expert eligible, as `category` does by default."""
    k: Annotated[int, Field(ge=1)] | None = None
    """Most experts of a decision; alone it is short for `select: {kind: top-k, k: ...}`."""
    fallback: str | None = None
    """The expert that answers when the chosen one fails before its first token."""

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


class Config(Section):
    """The configuration of a service; every key has a default."""

    registry: str | None = None
    """SQLAlchemy URL of the registry; null takes SQLite at `$COE_HOME/registry.db`. The password
    belongs into the environment."""
    experts: tuple[Path, ...] = ()
    """Experts files; the registry is then in memory and holds what they say. Not with `registry`."""
    engines: EnginesConfig = EnginesConfig()
    """Settings of each engine."""
    host: HostConfig = HostConfig()
    """Memory for weights, per process."""
    policies: dict[str, PolicyConfig] = Field(default_factory=dict)
    """Ways to answer, by name."""
    default_policy: str = "default"
    """The policy of `model: auto`."""
    serve: ServeConfig = ServeConfig()
    """The endpoint of `coe serve`."""
    batch: BatchConfig = BatchConfig()
    """The processes of `coe batch`."""

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
        degraded = (self.serve.brownout and self.serve.brownout.policies) or ()
        if self.policies and (unknown := sorted(set(degraded) - self.policies.keys())):
            raise ValueError(f"serve.brownout.policies: {', '.join(unknown)} not among {sorted(self.policies)}")
        if self.registry and self.experts:
            raise ValueError("give either `registry` (a database URL) or `experts` (files), not both")
        return self

    def with_pools(self, pools: Iterable[HostPoolConfig]) -> Self:
        """The same with these `serve.pools`."""
        return self.model_copy(update={"serve": self.serve.model_copy(update={"pools": tuple(pools)})})


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
