"""Engines: what turns an expert's files into text. `base` has the protocols, `ENGINES` lists the kinds."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from coe.engines.base import Adapter, Engine, Expert
from coe.errors import ConfigError
from registry.spec import ExpertSpec, Kind

__all__ = ["ENGINES", "Adapter", "Engine", "Expert", "create_engine", "engine_kind"]

ENGINES: Final[dict[str, str]] = {
    "fake": "coe.engines.fake:FakeEngine",
    "hf": "coe.engines.hf.engine:HFEngine",
    "remote": "coe.engines.remote.engine:RemoteEngine",
}
"""Kind -> where its class is. Adding an engine is one file and one line here; it is imported when first created."""


def engine_kind(spec: ExpertSpec, default: str = "hf") -> str:
    """The kind of engine that serves `spec`: remote endpoints and fakes have theirs, all else takes `default`."""
    if spec.kind is Kind.REMOTE:
        return "remote"
    return "fake" if spec.source.startswith("fake://") else default


def create_engine(kind: str, **options: Any) -> Engine:
    """An engine of the given kind; `options` are its constructor's arguments.

    Raises:
        ConfigError: there is no such kind, or it does not take these options.
    """
    if kind not in ENGINES:
        raise ConfigError(f"there is no engine {kind!r}; there are: {', '.join(sorted(ENGINES))}")
    module, _, name = ENGINES[kind].partition(":")
    try:
        engine: Engine = getattr(import_module(module), name)(**options)
    except TypeError as error:
        raise ConfigError(f"engine {kind!r} cannot be created with {options}: {error}") from error
    return engine
