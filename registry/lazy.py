"""Public names of a package that are imported when they are first used (PEP 562), so that importing it stays light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, rooms: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names are defined in its modules.

    Args:
        package: its `__name__`.
        rooms: module -> the public names that are defined there, separated by spaces.
    """
    where = {name: module for module, names in rooms.items() for name in names.split()}
    namespace = sys.modules[package].__dict__

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(where[name]), name)
        return value

    def names() -> list[str]:
        return sorted({*namespace, *where})

    return get, names
