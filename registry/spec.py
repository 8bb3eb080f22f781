"""ExpertSpec: everything the system knows of an expert without loading it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

RESERVED_PREFIX = "coe/"
RESERVED_NAMES = frozenset({"auto", "coe"})
INPUT_USD_PER_MTOK_PER_BILLION = 0.01
"""Default price of a local expert: USD per million prompt tokens for each 1e9 active parameters, about what hosted
open models charge. Only the proportions matter for routing: twice the active parameters, twice the cost."""
OUTPUT_USD_PER_MTOK_PER_BILLION = 0.03
"""The same for generated tokens, which are dearer: they are computed one after the other."""
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


class FileRecord(BaseModel):
    """One file of a registered expert: what `coe registry verify` compares with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: str


class ExpertSpec(BaseModel):
    """One expert: a whole model, an adapter on a base, a remote endpoint.

    Frozen data; a live expert is built from it by an engine. Sizes, context length, architecture and digest
    are read from the files (`registry.describe`), except for remote experts, where the user states them.

    Attributes:
        name: unique; not `auto`, nor under `coe/`.
        source: folder or `*.gguf` file (relative to the file that names it, `~/...`, absolute, or `home://...` under
            `$COE_HOME`), `hf://org/name[@revision]`, `https://host/v1` or `fake://behaviour`; none for composed. With
            an `engine` of its own, also any other `scheme://...` that the engine reads.
        engine: kind of the engine that serves the expert: built in, of a plug-in, or `module:Class`; `None` takes the
            one that fits the source. An adapter runs on its base's.
        base: name of the base expert, for adapters only.
        model: the name a remote endpoint knows the expert by; defaults to `name`.
        api_key_env: name of the environment variable that holds a remote endpoint's key.
        parameters_total, parameters_active: counts; for an adapter its own weights and the base's are apart
            (active = base active + adapter).
        size_bytes: bytes the weights take on disk, which bounds what they take resident.
        context_length: tokens, prompt and answer together.
        price: for local experts it defaults to `Price.of_parameters`; an adapter's to its base's price, scaled by
            their active parameters.
        digest: `sha256:...` over weights, tokenizer, chat template and adapter config (file names included).
        files: the files under the digest, each with size and hash.
        version: given by the registry; `None` before registration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    source: str = ""
    revision: str | None = None
    engine: Annotated[str, Field(min_length=1, max_length=256)] | None = None
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
    files: tuple[FileRecord, ...] = ()
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

    @field_serializer("capabilities", "tags", when_used="json")
    def _in_order(self, values: frozenset[str]) -> list[str]:
        return sorted(values)  # the same spec is the same JSON

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        if self.kind is Kind.ADAPTER and not self.base:
            raise ValueError("an adapter needs `base`, the name of the expert it was trained on")
        if self.kind is not Kind.ADAPTER and self.base:
            raise ValueError(f"`base` is for adapters; this expert is of kind {self.kind.value!r}")
        if self.kind is Kind.COMPOSED and len(self.members) < 2:
            raise ValueError("a composed expert needs at least two `members`")
        if self.kind is not Kind.COMPOSED and self.members:
            raise ValueError(f"`members` is for composed experts; this one is of kind {self.kind.value!r}")
        if self.engine and self.kind in (Kind.ADAPTER, Kind.COMPOSED):
            runs_on = "its base's engine" if self.kind is Kind.ADAPTER else "the engines of its members"
            raise ValueError(f"an expert of kind {self.kind.value!r} runs on {runs_on}: leave `engine` out")
        if bool(self.source) == (self.kind is Kind.COMPOSED):
            raise ValueError(
                "`source` is required: where the expert's files or its endpoint are"
                if not self.source
                else "a composed expert has no `source`: its members have"
            )
        if self.kind is Kind.REMOTE and not self.source.startswith(("http://", "https://")):
            raise ValueError(f"a remote expert's source is an http(s) URL ending in /v1, not {self.source!r}")
        if self.kind is not Kind.REMOTE and self.source.startswith(("http://", "https://")):
            raise ValueError(f"an expert at a URL is of kind 'remote', not {self.kind.value!r}")
        return self

    @property
    def ref(self) -> str:
        """`name@version`, or the bare name before registration."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @property
    def references(self) -> tuple[str, ...]:
        """The names of the experts that this one is made of: its base, or its members."""
        return (self.base,) if self.base else self.members

    @property
    def residency_key(self) -> str:
        """What must be resident to answer with this expert: an adapter's base, else the expert itself."""
        return self.base or self.name
