"""Engines: what turns an expert's files into text. `base` has the protocols, `ENGINES` lists the kinds.

Other packages add engines by entry points in the group `coe.engines`; `module:Class` names any class. An expert says
which engine serves it by `engine:` in its spec (docs/plugins.md).
"""

from __future__ import annotations

from typing import Any, Final

from coe.engines.base import Adapter, Engine, Expert
from coe.errors import ConfigError
from registry.errors import PluginError
from registry.plugins import Plugins
from registry.spec import ExpertSpec, Kind

__all__ = ["ENGINES", "Adapter", "Engine", "Expert", "create_engine", "engine_kind"]

ENGINES: Final[dict[str, str]] = {
    "fake": "coe.engines.fake:FakeEngine",
    "hf": "coe.engines.hf.engine:HFEngine",
    "remote": "coe.engines.remote.engine:RemoteEngine",
}
"""Kind -> where its class is. Adding an engine is one file and one line here; it is imported when first created."""

_PLUGINS = Plugins("coe.engines", "engine", ENGINES, needs=("footprint", "load", "unload"))


def engine_kind(spec: ExpertSpec, default: str = "hf") -> str:
    """The kind of engine that serves `spec`: the stated one, else `remote` or `fake` by its source, else `default`."""
    if spec.engine is not None:
        return spec.engine
    if spec.kind is Kind.REMOTE:
        return "remote"
    return "fake" if spec.source.startswith("fake://") else default


def create_engine(kind: str, **options: Any) -> Engine:
    """An engine of the given kind; `options` are its constructor's arguments.

    Raises:
        ConfigError: there is no such kind, its class cannot be imported or is no engine, or it refuses the options.
    """
    try:
        engine: Engine = _PLUGINS.load(kind)(**options)
    except PluginError as error:
        raise ConfigError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine {kind!r} cannot be created with {options}: {error}") from error
    return engine
