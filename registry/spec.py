"""ExpertSpec: the data of an expert that is known without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from registry.commands import SCHEME, ServerCommand
from registry.endpoints import MOST_ENDPOINTS, RemoteEndpoint, repeated
from registry.errors import without_userinfo

RESERVED_PREFIX = "coe/"
RESERVED_NAMES = frozenset({"auto", "coe"})
INPUT_USD_PER_MTOK_PER_BILLION = 0.01
"""Default price of a local expert: USD per million prompt tokens for each 1e9 active parameters, about what hosted
open models charge. Only the proportions matter for routing: twice the active parameters, twice the cost."""
OUTPUT_USD_PER_MTOK_PER_BILLION = 0.03
"""The same for generated tokens, which cost more because they are computed one after the other."""
COMPOSED_ARCHITECTURES: dict[str, str] = dict.fromkeys(("notes", "cache", "mot", "lora-mix", "logits"), "hf")
"""`architecture` of composed experts, which states how members are combined -> kind of the engine that serves them."""
STAGED_ARCHITECTURES = frozenset({"notes", "cache"})
"""Those whose first member answers alone, with the notes of the others, which are called before: on any host, and not
in memory beside it."""
ONE_BASE_ARCHITECTURES = frozenset({"lora-mix"})
"""Those whose members are adapters of one base, which is computed once for all of them."""
ONE_MODEL_ARCHITECTURES = frozenset({"cache"})
"""Those whose members are one model and adapters of it: the first one reads key-value entries of the others."""
TRAINED_ARCHITECTURES = frozenset({"notes", "cache", "mot"})
"""Those that always need an artifact, the folder that training writes."""
_SEPARATOR = "+"
"""Joins the names of a residency; no expert name contains it."""
_MOST_SETTINGS_CHARACTERS = 65_536
_USERINFO = re.compile(r"^\s*(https?://)[^/]*@|^\s*([a-z][a-z0-9+.-]*://)[^/?#@:]*:[^/?#@]*@", re.IGNORECASE)
"""`user@` or `user:password@` of a web URL, `user:password@` of any other: a repository may have a name with `@`."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class Kind(StrEnum):
    """Kind of an expert; `adapter` needs a `base`, `composed` needs `members`."""

    MODEL = "model"
    ADAPTER = "adapter"
    REMOTE = "remote"
    EMBEDDING = "embedding"
    COMPOSED = "composed"


class Price(BaseModel):
    """Price of an expert, in USD per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input_usd_per_mtok: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """USD per million prompt tokens."""
    output_usd_per_mtok: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """USD per million generated tokens."""

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost in USD of a query with that many tokens in and out."""
        return (prompt_tokens * self.input_usd_per_mtok + completion_tokens * self.output_usd_per_mtok) / 1e6

    @classmethod
    def of_parameters(cls, active: int) -> Price:
        """The default price of a local expert: proportional to its active parameters, six significant digits."""
        rates = (INPUT_USD_PER_MTOK_PER_BILLION, OUTPUT_USD_PER_MTOK_PER_BILLION)
        input_usd, output_usd = (float(f"{rate * active / 1e9:.6g}") for rate in rates)
        return cls(input_usd_per_mtok=input_usd, output_usd_per_mtok=output_usd)

    def scaled(self, factor: float) -> Price:
        """This price times `factor`, six significant digits."""
        return Price(
            input_usd_per_mtok=float(f"{self.input_usd_per_mtok * factor:.6g}"),
            output_usd_per_mtok=float(f"{self.output_usd_per_mtok * factor:.6g}"),
        )


def check_name(name: str) -> None:
    """Refuse what is no name of an expert or an alias. Raises ValueError."""
    if name in RESERVED_NAMES or name.startswith(RESERVED_PREFIX):
        raise ValueError(
            f"{name[:160]!r} is reserved: 'auto' and 'coe/...' address routing policies; choose another name"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:160]!r} is not a name: letters, digits and . _ / - only, starting with a letter or digit"
        )


def without_credentials(url: str) -> str:
    """The URL without user name and password."""
    return _USERINFO.sub(lambda found: found[1] or found[2], url)


class FileRecord(BaseModel):
    """One file of a registered expert, with which `coe registry verify` compares."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name inside the expert's folder."""
    size_bytes: Annotated[int, Field(ge=0)]
    """Size of the file."""
    sha256: str
    """SHA-256 of its content."""


class ExpertSpec(BaseModel):
    """One expert: a whole model, an adapter on a base, a remote endpoint.

    Frozen data; a live expert is built from it by an engine. Sizes, context length, architecture and digest are read
    from the files (`registry.describe`), except for remote experts, where the user states them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    name: str
    """Unique name by which requests address the expert; not `auto`, and not under `coe/`."""
    kind: Kind
    """Kind of the expert; `adapter` needs `base`, `composed` needs `members`."""
    source: str = ""
    """A folder or GGUF file (relative to the file that names it, `~/...`, absolute, or `home://...` under `$COE_HOME`;
    a folder may hold one GGUF file), `hf://org/name[/file.gguf][@revision]`, `https://host/v1`, or `fake://behaviour`;
    of a composed expert the folder that `coe latent train` wrote, none for one that is not trained. With `engine`, also
    any other `scheme://...` that this engine reads. Of a remote expert also a mapping with `command`: the server that
    is started for it on this machine (`server`, below)."""
    server: ServerCommand | None = None
    """The mapping `source` of a remote expert; it is written as `source`."""
    endpoints: Annotated[tuple[RemoteEndpoint, ...], Field(max_length=MOST_ENDPOINTS)] = ()
    """Several endpoints of a remote expert, in place of `source`, which is then the URL of the first: requests are
    spread by weight, and one that fails is avoided for a while (docs/remote.md)."""
    revision: str | None = None
    """Branch, tag or commit of an `hf://` source; the registry pins the commit."""
    engine: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Kind of the engine that serves the expert: built in, of a plug-in, or `module:Class`; null and `auto`
    mean the one that fits the source: for weights, `vllm` on a CUDA device where it is installed, else `hf`. An adapter
    runs on the engine of its base."""
    base: str | None = None
    """Name of the expert that an adapter was trained on."""
    delta_base: str | None = None
    """Name of the model that the weights of this one are stored as a difference from, where its source is a delta of
    `coe registry compress`; null for all others."""
    model: str | None = None
    """Name of the expert at a remote endpoint; null means `name`."""
    api_key_env: str | None = None
    """Environment variable with the key of a remote endpoint; of several, the key of those that name none."""
    tool_call_parser: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """How answers state tool calls: a name of `vllm serve --tool-call-parser`, such as `hermes`. null and `auto`: read
    from the chat template; of an adapter, as its base. Only the engine `vllm` reads it (docs/vllm.md)."""
    reasoning_parser: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """How answers state reasoning: a name of `vllm serve --reasoning-parser`, such as `qwen3`; else as
    `tool_call_parser`."""
    members: tuple[str, ...] = ()
    """Names of the experts that a composed expert combines, the one that answers first."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """How a composed expert combines its members (docs/latent.md); read from its artifact, stated without one."""
    trained_with: Mapping[str, str] = Field(default_factory=dict)
    """Identity (`registry.digest.identity`) of each member of a composed expert when it was trained; read from its
    artifact."""
    architecture: str | None = None
    """Class of the model, read from the files; of a composed expert, how its members are combined (stated)."""
    quantization: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """How the weights are quantised (`awq`, `gptq`, `fp8`, `compressed-tensors`, `gguf-q4_1`, ...), of an adapter those
    of its base; read from the files, null if they are not."""
    parameters_total: Annotated[int, Field(ge=0)] | None = None
    """Number of weights, packed ones too, of an adapter its own; read from the files."""
    parameters_active: Annotated[int, Field(ge=0)] | None = None
    """Weights used for one token, of an adapter including its base; read from the files."""
    size_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of the weights on disk (of a delta, once restored), an upper bound of their memory; read from the files."""
    context_length: Annotated[int, Field(gt=0)] | None = None
    """Tokens of prompt and answer together; read from the files, and required for remote experts."""
    price: Price | None = None
    """Price; null means a default in proportion to the active parameters for local experts, and unknown for remote
    ones."""
    capabilities: frozenset[str] = frozenset({"chat"})
    """Capabilities beside that of the kind (`embedding`, of all others `chat`), which need not be listed: `tools`,
    `vision`, `json` (JSON mode), `json_schema`, `logprobs`, `prompt_logprobs`, `token_prompts`, `sampling`,
    `reasoning`. Those of its engine need not be stated, except `vision`, and `tools` where no chat template in the
    files renders tools and there is no `tool_call_parser`; a `reasoning_parser` states `reasoning`."""
    licence: str | None = None
    """Licence of the weights; read from the model card, if there is one."""
    description: str = ""
    """One line about the strengths of the expert."""
    tags: frozenset[str] = frozenset()
    """Words for the selection of experts."""
    ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds without a request after which the weights are unloaded; 0 never unloads them, null takes `host.ttl_s`.
    Requests to adapters and composed experts count for the weights that they use, whose own `ttl_s` holds."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Weights of lower priority are evicted first, whatever the policy of eviction says. That of an adapter or composed
    expert also holds for the weights that it uses: the highest counts."""
    digest: str | None = None
    """`sha256:...` over weights, tokenizer, chat template and adapter config; if stated, it must match the files."""
    restores: str | None = None
    """Digest of the files that a delta restores, which is that of the expert's own files if it is exact; read from the
    delta."""
    files: tuple[FileRecord, ...] = ()
    """The files that the digest covers; assigned by the registry."""
    version: Annotated[int, Field(ge=1)] | None = None
    """Assigned by the registry."""

    @model_validator(mode="before")
    @classmethod
    def _source_may_be_elsewhere(cls, value: Any) -> Any:
        """The source that a command or the first of several endpoints stands for."""
        if not isinstance(value, dict):
            return value
        if value.get("endpoints") and not value.get("source"):
            first = value["endpoints"][0] if isinstance(value["endpoints"], list | tuple) else None
            url = first.get("url") if isinstance(first, dict) else getattr(first, "url", None)
            return {**value, "source": url} if isinstance(url, str) else value
        if not isinstance(value.get("source"), dict):
            return value
        if "server" in value:
            raise ValueError("a command is written as `source: {command: [...]}`; leave `server` out")
        server = ServerCommand.model_validate(value["source"])
        return {**value, "source": server.source, "server": server}

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        check_name(name)
        return name

    @field_validator("source", "model")
    @classmethod
    def _url_has_no_password(cls, url: str | None) -> str | None:
        if url is not None and without_credentials(url) != url:
            raise ValueError(
                "a URL with a user name or password is not accepted: leave out what is before '@', and name the "
                "environment variable with the key as `api_key_env`"
            )
        return url

    @field_validator("tool_call_parser", "reasoning_parser")
    @classmethod
    def _no_parser_is_auto(cls, parser: str | None) -> str | None:
        return None if parser == "auto" else parser

    @field_validator("settings")
    @classmethod
    def _settings_are_json(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            text = json.dumps(settings, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"settings are JSON values: {error}") from None
        if len(text) > _MOST_SETTINGS_CHARACTERS:
            raise ValueError(
                f"settings take at most {_MOST_SETTINGS_CHARACTERS:,} characters as JSON, not {len(text):,}"
            )
        return settings

    @field_serializer("capabilities", "tags", when_used="json")
    def _in_order(self, values: frozenset[str]) -> list[str]:
        return sorted(values)  # the same spec is the same JSON

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        if self.kind is Kind.ADAPTER and not self.base:
            raise ValueError("an adapter needs `base`, the name of the expert it was trained on")
        if self.kind is not Kind.ADAPTER and self.base:
            raise ValueError(f"`base` is for adapters; this expert is of kind {self.kind.value!r}")
        if self.kind is not Kind.MODEL and self.delta_base:
            raise ValueError(f"`delta_base` is for models; this expert is of kind {self.kind.value!r}")
        if self.kind is Kind.COMPOSED and len(self.members) < 2:
            raise ValueError("a composed expert needs at least two `members`")
        if self.kind is not Kind.COMPOSED and self.members:
            raise ValueError(f"`members` is for composed experts; this one is of kind {self.kind.value!r}")
        if self.engine and self.kind in (Kind.ADAPTER, Kind.COMPOSED):
            runs_on = "its base's engine" if self.kind is Kind.ADAPTER else "the engines of its members"
            raise ValueError(f"an expert of kind {self.kind.value!r} runs on {runs_on}: leave `engine` out")
        if (self.tool_call_parser or self.reasoning_parser) and self.kind not in (Kind.MODEL, Kind.ADAPTER):
            raise ValueError(
                f"`tool_call_parser` and `reasoning_parser` are for models and adapters, not kind {self.kind.value!r}"
            )
        if self.ttl_s is not None and self.kind in (Kind.ADAPTER, Kind.COMPOSED):
            raise ValueError(
                f"`ttl_s` is for experts with weights of their own; one of kind {self.kind.value!r} uses those of "
                f"{', '.join(self.references)}: state it there"
            )
        if self.kind is Kind.COMPOSED:
            self._check_composed()
        elif self.settings:
            raise ValueError(f"`settings` is for composed experts; this one is of kind {self.kind.value!r}")
        elif not self.source:
            raise ValueError("`source` is required: where the expert's files or its endpoint are")
        if (self.server is not None) != self.source.startswith(SCHEME):
            raise ValueError("a command is written as `source: {command: [...]}`")
        if self.server is not None and (self.kind is not Kind.REMOTE or self.engine is not None):
            raise ValueError("an expert whose source is a command is of kind 'remote', and states no `engine`")
        if self.kind is Kind.REMOTE and not self.source.startswith(("http://", "https://", SCHEME)):
            raise ValueError(
                "a remote expert's source is an http(s) URL ending in /v1, or {command: [...]}, not "
                f"{without_userinfo(self.source)!r}"
            )
        self._check_endpoints()
        if self.kind is not Kind.REMOTE and self.source.startswith(("http://", "https://")):
            raise ValueError(f"an expert at a URL is of kind 'remote', not {self.kind.value!r}")
        return self

    def _check_endpoints(self) -> None:
        if not self.endpoints:
            return
        if self.kind is not Kind.REMOTE or self.server is not None:
            raise ValueError("`endpoints` is for experts of kind 'remote' without a command")
        if self.source != self.endpoints[0].url:
            raise ValueError("with `endpoints`, leave `source` out: it is the URL of the first of them")
        if (url := repeated(self.endpoints)) is not None:
            raise ValueError(f"the endpoint {url} is listed twice with the same model and key: give it a larger weight")

    def _check_composed(self) -> None:
        if twice := sorted({name for name in self.members if self.members.count(name) > 1}):
            raise ValueError(f"members are different experts; given twice: {', '.join(twice)}")
        if "://" in self.source and not self.source.startswith(("home://", "hf://")):
            raise ValueError("the source of a composed expert is the folder that `coe latent train` wrote")
        if self.architecture in TRAINED_ARCHITECTURES and not self.source:
            raise ValueError(
                f"a composed expert of the architecture {self.architecture!r} is trained: `source` is the folder that "
                "`coe latent train` wrote"
            )

    def stated(self) -> Self:
        """The spec as its author means it: the capabilities of a file or of flags add to the default of the kind.

        A registered spec has all of its capabilities, and is read as it is.
        """
        if self.kind is not Kind.EMBEDDING:
            return self.model_copy(update={"capabilities": self.capabilities | {"chat"}})
        return self.model_copy(update={"capabilities": self.capabilities - {"chat"} | {"embedding"}})

    @property
    def ref(self) -> str:
        """`name@version`, or the bare name before registration."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @property
    def is_staged(self) -> bool:
        """Whether its peers are called before its first member answers with their notes."""
        return self.kind is Kind.COMPOSED and self.architecture in STAGED_ARCHITECTURES

    @property
    def resident_members(self) -> tuple[str, ...]:
        """The members of a composed expert that are in memory together while it answers."""
        return self.members[:1] if self.is_staged else self.members

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the experts that this one needs: its base, that of its delta, or its members."""
        needed = self.base or self.delta_base
        return (needed,) if needed else self.members

    def residency_keys(self, experts: Mapping[str, ExpertSpec]) -> tuple[str, ...]:
        """Names of the experts whose weights must be resident to answer with this one: distinct, in order.

        A model needs itself, an adapter its base, a composed expert what its members need, or its first member alone
        (`STAGED_ARCHITECTURES`).

        Args:
            experts: by name; the members of a composed expert are among them.
        """
        if self.kind is Kind.COMPOSED:
            members = self.resident_members
            return tuple(dict.fromkeys(key for name in members for key in experts[name].residency_keys(experts)))
        return (self.base or self.name,)

    def residency(self, experts: Mapping[str, ExpertSpec]) -> str:
        """`residency_keys` as one string, equal for all experts that need the same weights; see `residency_names`."""
        return _SEPARATOR.join(sorted(self.residency_keys(experts)))


def residency_names(residency: str) -> tuple[str, ...]:
    """The names of the experts in an `ExpertSpec.residency`, sorted."""
    return tuple(residency.split(_SEPARATOR))
