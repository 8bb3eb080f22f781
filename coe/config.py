"""The whole configuration of a service in one tree, validated once, at the edge.

    registry: sqlite:////var/lib/coe/registry.db     # or experts: [experts.yaml], for a registry in memory
    host: {budget: 8GiB, pins: [general]}
    policies:
      default: {router: ./router, composition: single, fallback: general}

Relative paths are relative to the file that names them. Secrets are never in here: specs name environment variables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from coe.errors import ConfigError
from registry.documents import load_document, validate
from registry.errors import InvalidSpec
from registry.sources import local_path


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


class EnginesConfig(_Section):
    """Settings of each engine."""

    hf: HFConfig = HFConfig()
    remote: RemoteConfig = RemoteConfig()


class HostConfig(_Section):
    """One process that holds weights.

    budget: bytes that resident experts may take ("8GiB"); None takes 80% of what is free on the device at the start.
    pins: experts that stay resident once loaded. aging_s: seconds a request may be passed over for resident experts.
    """

    budget: ByteSize | None = None
    pins: tuple[str, ...] = ()
    aging_s: Annotated[float, Field(gt=0)] = 10.0
    max_waiting: Annotated[int, Field(ge=1)] = 10_000


class PolicyConfig(_Section):
    """A named way to answer, addressed as `model: "coe/<name>"`.

    router: folder of a trained router (`coe router train`). expert: always this one, in place of a router.
    dial: quality (score in [0, 1]) given up per USD. patience: quality given up per second of loading.
    fallback: the expert that answers when the chosen one fails before its first token.
    """

    router: Path | None = None
    expert: str | None = None
    composition: str = "single"
    dial: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    k: Annotated[int, Field(ge=1)] = 1
    fallback: str | None = None

    @field_validator("router", mode="before")
    @classmethod
    def _from_here(cls, path: object, info: ValidationInfo) -> object:
        return _resolve(path, info)

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
