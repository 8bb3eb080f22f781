"""Composed experts of the engine hf: one file for each architecture, one line each in the table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Expert, Member
from coe.errors import Unsupported
from registry.spec import ExpertSpec

COMPOSED: Final[Mapping[str, str]] = {
    "lora-mix": "coe.engines.hf.composed.lora_mix:LoraMix",
    "logits": "coe.engines.hf.composed.logits:Logits",
    "notes": "coe.engines.hf.composed.notes:NotesExpert",
    "cache": "coe.engines.hf.composed.cache:CacheExpert",
    "mot": "coe.engines.hf.composed.mot:Mot",
}
"""Architecture -> its class, imported on first use. It takes the spec, the members by name, and the artifact's folder
or None; it loads nothing."""


def compose(spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> Expert:
    """A composed expert made of leased members, for one request.

    Raises:
        Unsupported: there is no such architecture, or the members do not fit it.
    """
    composed: Expert = _class(spec)(spec, members, path)
    return composed


def check(spec: ExpertSpec) -> None:
    """Refuse settings before the first request; a class without a method `check` has none to check.

    Raises:
        ConfigError: a setting is wrong.
        Unsupported: there is no such architecture.
    """
    check_settings = getattr(_class(spec), "check", None)
    if check_settings is not None:
        check_settings(spec)


def _class(spec: ExpertSpec) -> Any:
    if (place := COMPOSED.get(spec.architecture or "")) is None:
        raise Unsupported(
            f"the engine hf serves no composed expert of the architecture {spec.architecture!r}; it serves: "
            f"{', '.join(COMPOSED)}"
        )
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
