"""Plug-ins: classes of other packages, named by an installed entry point or as `module:Class`.

    routers = Plugins("coe.routers", "router kind", KINDS, needs=("fit", "estimate", "state", "from_state"))
    routers.load("knn")               # built in
    routers.load("length")            # an installed package gives `length` the value "lengths.router:LengthRouter"
    routers.load("lengths.router:LengthRouter")

Names in configurations, experts files, tasks and commands are trusted: their modules are imported. A saved router is
not trusted: while it loads (`only_modules`), `module:Class` is imported only from modules that the caller allows or
that `$COE_PLUGINS` lists. Built-in kinds and entry points always load: their packages were installed on purpose.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import Any

from registry.errors import PluginError, UnknownPlugin
from registry.spelling import did_you_mean

ALLOW = "COE_PLUGINS"
"""Environment variable: modules, separated by commas, that untrusted files may name as `module:Class`."""
_TARGET = re.compile(r"[\w.]+:[A-Za-z_][\w.]*")
_only: ContextVar[frozenset[str] | None] = ContextVar("modules that module:Class is imported from", default=None)


@dataclass(frozen=True, slots=True)
class Plugins:
    """The classes of one sort: built in, from entry points, and by `module:Class`.

    Attributes:
        group: entry-point group, such as `coe.routers`.
        noun: what messages call a name, such as `router kind`.
        builtin: name -> class, or where it is (`module:Class`, imported when it is used).
        needs: attributes that a class must have. or_needs: others that serve as well. base: what it must derive from.
    """

    group: str
    noun: str
    builtin: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    or_needs: tuple[str, ...] = ()
    base: type | None = None

    def names(self) -> tuple[str, ...]:
        """The built-in names, then those of installed entry points. Imports no plug-in."""
        return (*self.builtin, *sorted(self._installed().keys() - self.builtin.keys()))

    def __contains__(self, name: object) -> bool:
        """Whether `name` is one of `names()`, or has the form `module:Class`. Imports no plug-in."""
        return isinstance(name, str) and (":" in name or name in self.builtin or name in self._installed())

    def load(self, name: str) -> Any:
        """The class of that name.

        Raises:
            UnknownPlugin: there is no such name; lists the known ones.
            PluginError: it cannot be imported, is not allowed here, lacks what it needs, or two packages use the name.
        """
        self._refuse_clash(name)
        if name in self.builtin:
            found = self.builtin[name]
            return _attribute(found) if isinstance(found, str) else found
        if ":" in name:
            return self._checked(self._import(name, f"{self.noun} {name!r}", restricted=True), name)
        if name not in self._installed():
            raise UnknownPlugin(f"there is no {self.noun} {name!r}{did_you_mean(name, self.names(), listed=True)}")
        [entry] = self._installed()[name]
        shown = f"{self.noun} {name!r} of {_package(entry)} (entry point {entry.value!r} in {self.group})"
        return self._checked(self._import(entry.value, shown, restricted=False), name)

    def name_of(self, found: type, stated: str | None = None) -> str:
        """A name under which the class loads again: the stated one if it leads there, else `module:Class`.

        Raises:
            PluginError: the class is defined inside a function, so no name leads to it.
        """
        if stated is not None and ":" not in stated and stated in self and self.load(stated) is found:
            return stated
        if "<locals>" in found.__qualname__:
            raise PluginError(
                f"{found.__qualname__} is defined inside a function, so that no `module:Class` names it: move it to "
                "the top of its module"
            )
        return f"{found.__module__}:{found.__qualname__}"

    def _installed(self) -> Mapping[str, tuple[EntryPoint, ...]]:
        return _entry_points(self.group, tuple(sys.path))

    def _refuse_clash(self, name: str) -> None:
        """A package that is installed later must not change the meaning of a saved file."""
        entries = self._installed().get(name, ())
        given_by = [*(["coe itself"] if name in self.builtin else []), *map(_package, entries)]
        if len(given_by) > 1:
            raise PluginError(
                f"{self.noun} {name!r} is given by {' and by '.join(given_by)} (entry points in {self.group}): "
                "uninstall one, rename its entry point, or name its class as module:Class"
            )

    def _import(self, target: str, shown: str, *, restricted: bool) -> Any:
        if not _TARGET.fullmatch(target):
            raise PluginError(f"{shown}: {target!r} is not of the form module:Class")
        module = target.partition(":")[0]
        if restricted and not _is_allowed(module):
            raise PluginError(
                f"{shown} is named by an untrusted file, so the module {module!r} is not "
                f"imported. If you trust it, allow it: {ALLOW}={module} in the environment, `plugins: [{module}]` in "
                f"the policy, or plugins=[{module!r}] in Python"
            )
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results: an import may print
                return _attribute(target)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise PluginError(f"{shown} cannot be imported: {error}") from error
            raise PluginError(
                f"{shown}: there is no module {error.name!r}; install it, or add its folder to PYTHONPATH"
            ) from error
        except AttributeError as error:
            raise PluginError(f"{shown} cannot be imported: {error}") from error
        except (Exception, SystemExit, GeneratorExit) as error:  # third-party code may raise anything
            raise PluginError(f"{shown} cannot be imported: {type(error).__name__}: {error}") from error

    def _checked(self, found: Any, name: str) -> type:
        if not isinstance(found, type):
            raise PluginError(f"{self.noun} {name!r} is not a class, but {type(found).__name__}")
        if self.base is not None and not issubclass(found, self.base):
            wanted = f"{self.base.__module__}.{self.base.__qualname__}"
            raise PluginError(f"{self.noun} {name!r}: {found.__qualname__} must derive from {wanted}")
        lacking = [need for need in self.needs if not hasattr(found, need)]
        if lacking and not (self.or_needs and all(hasattr(found, need) for need in self.or_needs)):
            either = f", or {', '.join(self.or_needs)}" if self.or_needs else ""
            raise PluginError(
                f"{self.noun} {name!r}: the class {found.__qualname__} has no {', '.join(lacking)}; it needs "
                f"{', '.join(self.needs)}{either} (docs/plugins.md)"
            )
        return found


@contextmanager
def only_modules(modules: Collection[str]) -> Iterator[None]:
    """Inside, `module:Class` is imported only from these modules, what is below them, and those of `$COE_PLUGINS`."""
    listed = os.environ.get(ALLOW, "").split(",")
    token = _only.set(frozenset(modules) | {name.strip() for name in listed if name.strip()})
    try:
        yield
    finally:
        _only.reset(token)


def _is_allowed(module: str) -> bool:
    allowed = _only.get()
    return allowed is None or any(f"{module}.".startswith(f"{name}.") for name in allowed)


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return attrgetter(name)(import_module(module))


@lru_cache(maxsize=64)
def _entry_points(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Name -> its entry points. Reading the metadata of every installed package takes about 20 ms."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _package(entry: EntryPoint) -> str:
    return "an unnamed package" if entry.dist is None else f"the package {entry.dist.name} {entry.dist.version}"
