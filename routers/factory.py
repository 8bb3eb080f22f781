"""How a router of a kind is made: the kinds of `routers.kind_list`, and those of plug-ins.

Other packages add kinds by entry points in the group `coe.routers`; `module:Class` names any class (docs/plugins.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, Protocol, Self, get_type_hints, runtime_checkable

from registry.errors import PluginError
from registry.plugins import Plugins
from registry.spelling import did_you_mean
from routers.base import Router, RouterState
from routers.encoders.build import Encoder
from routers.errors import InvalidSettings, RouterError, UnknownRouterKind
from routers.kind_list import KINDS
from routers.outcomes.table import OutcomeTable

ROUTERS = Plugins("coe.routers", "router kind", KINDS, needs=("kind", "fit", "estimate", "state", "from_state"))
"""The kinds of the list, and those of plug-ins."""

ORACLES = ("dataset-oracle", "oracle")
"""Marks that read what a router may not: labels, scores. They stand in every evaluation and cannot be trained."""


@runtime_checkable
class TrainableRouter(Router, Protocol):
    """A router that learns from an outcome table and can be saved.

    `fit` returns a fitted router (itself). `from_state(state, encoder)` rebuilds exactly what `state()` gave.
    """

    kind: ClassVar[str]
    experts: tuple[str, ...]

    def fit(self, table: OutcomeTable) -> Self:
        """Learn from n queries with their scores; returns the fitted router itself."""
        ...

    def state(self) -> RouterState:
        """Everything `from_state` needs, as arrays and JSON values."""
        ...


class RouterClass(Protocol):
    """A class in `KINDS`: plain keyword settings, `encoder` among them if it reads text."""

    def __call__(self, **settings: Any) -> TrainableRouter:
        """An unfitted router."""
        ...

    def from_state(self, state: RouterState, encoder: Encoder | None) -> TrainableRouter:
        """The router that gave the state."""
        ...


def router_class(kind: str) -> RouterClass:
    """The class of a kind: a built-in name, an installed entry point, or `module:Class`.

    Raises:
        UnknownRouterKind: there is no such kind, with close matches and the whole list; or its class cannot be
            imported or is no router.
    """
    if kind in ORACLES:
        raise UnknownRouterKind(
            f"{kind!r} reads the scores or labels of the queries it routes, so it cannot be trained or served; "
            "`coe router cv` and `coe router eval` show it beside every router"
        )
    try:
        found: RouterClass = ROUTERS.load(kind)
    except PluginError as error:
        raise UnknownRouterKind(str(error)) from error
    return found


def kind_of(router: TrainableRouter) -> str:
    """The name under which the router's class is found again: its `kind`, or `module:Class` for a class without one.

    Raises:
        RouterError: the class is defined inside a function.
    """
    try:
        return ROUTERS.name_of(type(router), router.kind)
    except PluginError as error:
        raise RouterError(f"a {router.kind} router cannot be saved: {error}") from error


def settings_of(kind: str) -> dict[str, Any]:
    """The settings of a kind with their defaults (`inspect.Parameter.empty` where one must be given)."""
    parameters = inspect.signature(_stated_by(kind)).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for p in parameters if p.name != "encoder" and p.kind not in variadic}


def _stated_by(kind: str) -> Any:
    """The class whose constructor has a kind's settings: its dataclass `Settings`, or the router class itself."""
    found = router_class(kind)
    settings = getattr(found, "Settings", None)
    return settings if is_dataclass(settings) else found


def reads_text(kind: str) -> bool:
    """Whether a kind needs an encoder."""
    return "encoder" in inspect.signature(router_class(kind)).parameters


def build(kind: str, encoder: Encoder | None = None, settings: Mapping[str, Any] | None = None) -> TrainableRouter:
    """An unfitted router.

    Args:
        encoder: what it reads queries with; ignored by kinds that read no text.
        settings: keyword arguments of the kind's class.

    Raises:
        UnknownRouterKind: no such kind.
        InvalidSettings: a setting that the kind does not have, lacks, or cannot use; names those it has.
    """
    given, known = dict(settings or {}), settings_of(kind)
    _check_names(kind, given, known)
    given = {name: _checked(kind, name, value) for name, value in given.items()}
    if reads_text(kind):
        if encoder is None:
            raise InvalidSettings(f"a {kind} router reads text: it needs an encoder")
        given["encoder"] = encoder
    try:
        router = router_class(kind)(**given)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if name != "encoder")
        raise InvalidSettings(f"a {kind} router cannot be made with {shown}: {error}") from error
    if lacking := [name for name in ("requires", "experts") if not hasattr(router, name)]:
        raise UnknownRouterKind(f"a {kind} router has no attribute {', '.join(lacking)} (routers.TrainableRouter)")
    return router


def _check_names(kind: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or ";"
            raise InvalidSettings(f"a {kind} router has no setting {name!r}{hint} it has: {_listed(known)}")
    missing = [n for n, default in known.items() if default is inspect.Parameter.empty and n not in given]
    if missing:
        raise InvalidSettings(f"a {kind} router needs the setting {', '.join(missing)}; it has: {_listed(known)}")


def _checked(kind: str, name: str, value: Any) -> Any:
    """The value, if it is of the type that the class states."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # `Encoder` is imported for type checking only; here it need not mean anything.
        hints = get_type_hints(_stated_by(kind).__init__, localns={"Encoder": object})
    except NameError as error:
        raise InvalidSettings(
            f"the settings of a {kind} router cannot be checked: {error}; import it outside `if TYPE_CHECKING`"
        ) from error
    try:
        return TypeAdapter(hints.get(name, Any)).validate_python(value)
    except ValidationError as error:
        found = "; ".join(problem["msg"] for problem in error.errors())
        raise InvalidSettings(f"setting {name}={value!r} of a {kind} router: {found}") from error


def _listed(known: Mapping[str, Any]) -> str:
    empty = inspect.Parameter.empty
    return ", ".join(n if default is empty else f"{n}={default!r}" for n, default in known.items()) or "none"
