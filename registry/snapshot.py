"""Snapshot: the registry at one moment, immutable and picklable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from registry.errors import UnknownExpert
from registry.spec import ExpertSpec


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for one version of an expert.

    Attributes:
        moved_at: seconds since the epoch.
        moved_by: who moved it there, such as the id of an API key.
    """

    name: str
    expert: str
    version: int
    moved_at: float = 0.0
    moved_by: str = ""

    @property
    def ref(self) -> str:
        """`expert@version`."""
        return f"{self.expert}@{self.version}"


@dataclass(frozen=True)
class Snapshot:
    """The registry at one moment: its version (the number of changes so far) and its experts by name.

    Attributes:
        tokens_per_s: expert -> tokens that it generates per second, where a profile has measured it.
        aliases: by name.
        versions: `name@version` -> the expert under that name, for each version that an alias names and that is not
            the current one. `with_versions` makes them experts.
        drained: expert -> why no new request goes to it (`registry.expert_states`).
        pinned: the experts that an admin call has pinned.
        removed: names that were registered, and are not any more.
    """

    version: int
    experts: Mapping[str, ExpertSpec]
    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    versions: Mapping[str, ExpertSpec] = field(default_factory=dict)
    drained: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for each in fields(self):
            if isinstance(value := getattr(self, each.name), Mapping):
                object.__setattr__(self, each.name, MappingProxyType(dict(value)))

    def __reduce__(self) -> tuple[type[Snapshot], tuple[Any, ...]]:
        values = (getattr(self, each.name) for each in fields(self))
        return Snapshot, tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    def __contains__(self, name: object) -> bool:
        return name in self.experts

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def get(self, name: str) -> ExpertSpec:
        """The expert of a name, or of `name@version` if that is a version here.

        Raises:
            UnknownExpert: with close matches.
        """
        if (exact := self.experts.get(name)) is not None:
            return exact
        spec = self.experts.get(expert_of(name))
        if spec is None:
            raise UnknownExpert(name, self.experts)
        if name != spec.ref:
            raise UnknownExpert(name, [spec.ref])
        return spec

    def residency(self, name: str) -> str:
        """`ExpertSpec.residency` of the expert `name`. Raises UnknownExpert."""
        return self.get(name).residency(self.experts)

    def resolve(self, model: str) -> str:
        """The name in `experts` (of `with_versions`) that an alias points to; any other text as it is."""
        alias = self.aliases.get(model)
        if alias is None:
            return model
        current = self.experts.get(alias.expert)
        return alias.expert if current is not None and current.version == alias.version else alias.ref

    def with_versions(self) -> Snapshot:
        """The snapshot with `versions` among its experts, so that they are served beside the current ones.

        Such an expert is named `name@version` and states no version, so its `ref` is that of the time when it was the
        current one: weights that are in memory since then go on.
        """
        if not self.versions:
            return self
        drained = {name: why for name in self.versions if (why := self.drained.get(expert_of(name))) is not None}
        return replace(
            self, experts={**self.experts, **self.versions}, versions={}, drained={**self.drained, **drained}
        )

    def with_drained(self, drained: Mapping[str, str]) -> Snapshot:
        """The snapshot with other experts drained, and the versions of these."""
        all_of_them = {name: drained[expert_of(name)] for name in self.experts if expert_of(name) in drained}
        return replace(self, drained=all_of_them)


def expert_of(name: str) -> str:
    """The expert of `name` or `name@version`; no name of an expert contains `@`."""
    return name.partition("@")[0]


def as_version(spec: ExpertSpec) -> ExpertSpec:
    """A registered spec as the expert `name@version` of `Snapshot.versions`."""
    return spec.model_copy(update={"name": spec.ref, "version": None})


def of_version(spec: ExpertSpec) -> ExpertSpec:
    """The registered spec of an expert that `as_version` made; any other as it is."""
    name, separator, version = spec.name.partition("@")
    return spec.model_copy(update={"name": name, "version": int(version)}) if separator else spec
