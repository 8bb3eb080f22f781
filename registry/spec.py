"""ExpertSpec: everything the system knows of an expert without loading it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RESERVED_PREFIX = "coe/"
RESERVED_NAMES = frozenset({"auto", "coe"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class Kind(StrEnum):
    """What an expert is made of; `adapter` needs a `base`, `composed` needs `members`."""

    MODEL = "model"
    ADAPTER = "adapter"
    REMOTE = "remote"
    EMBEDDING = "embedding"
    COMPOSED = "composed"


class Price(BaseModel):
    """What an expert charges, in USD per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_usd_per_mtok: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    output_usd_per_mtok: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost in USD of a query with that many tokens in and out."""
        return (prompt_tokens * self.input_usd_per_mtok + completion_tokens * self.output_usd_per_mtok) / 1e6


class ExpertSpec(BaseModel):
    """One expert: a whole model, an adapter on a base, a remote endpoint.

    Frozen data; a live expert is built from it by an engine. Sizes, context length, architecture and digest
    are read from the files (`registry.sources.inspect`), except for remote experts, where the user states them.

    Attributes:
        name: unique; not `auto`, nor under `coe/`.
        source: folder, `*.gguf` file, `hf://org/name[@revision]`, `https://host/v1` or `fake://behaviour`.
        base: name of the base expert, for adapters only.
        model: the name a remote endpoint knows the expert by; defaults to `name`.
        api_key_env: name of the environment variable that holds a remote endpoint's key.
        parameters_total, parameters_active: counts; for an adapter its own weights and the base's are apart
            (active = base active + adapter).
        size_bytes: bytes the weights take on disk, which bounds what they take resident.
        context_length: tokens, prompt and answer together.
        digest: `sha256:...` over weights, tokenizer, chat template and adapter config (file names included).
        version: given by the registry; `None` before registration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    source: str
    revision: str | None = None
    base: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    members: tuple[str, ...] = ()
    architecture: str | None = None
    parameters_total: Annotated[int, Field(ge=0)] | None = None
    parameters_active: Annotated[int, Field(ge=0)] | None = None
    size_bytes: Annotated[int, Field(ge=0)] | None = None
    context_length: Annotated[int, Field(gt=0)] | None = None
    price: Price | None = None
    capabilities: frozenset[str] = frozenset({"chat"})
    licence: str | None = None
    description: str = ""
    tags: frozenset[str] = frozenset()
    digest: str | None = None
    version: Annotated[int, Field(ge=1)] | None = None

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED_NAMES or name.startswith(RESERVED_PREFIX):
            raise ValueError(
                f"{name!r} is reserved: 'auto' and 'coe/...' address routing policies; choose another name"
            )
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a name: letters, digits and . _ / - only, starting with a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        if self.kind is Kind.ADAPTER and not self.base:
            raise ValueError("an adapter needs `base`, the name of the expert it was trained on")
        if self.kind is not Kind.ADAPTER and self.base:
            raise ValueError(f"`base` is for adapters; this expert is of kind {self.kind.value!r}")
        if self.kind is Kind.COMPOSED and len(self.members) < 2:
            raise ValueError("a composed expert needs at least two `members`")
        if self.kind is Kind.REMOTE and not self.source.startswith(("http://", "https://")):
            raise ValueError(f"a remote expert's source is an http(s) URL ending in /v1, not {self.source!r}")
        return self

    @property
    def ref(self) -> str:
        """`name@version`, or the bare name before registration."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @property
    def residency_key(self) -> str:
        """What must be resident to answer with this expert: an adapter's base, else the expert itself."""
        return self.base or self.name
