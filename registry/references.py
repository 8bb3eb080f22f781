"""What experts refer to: bases, members, the base of a delta. That these exist and fit is checked before a change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from registry.errors import RegistryError, UnknownExpert
from registry.spec import COMPOSED_ARCHITECTURES, ONE_BASE_ARCHITECTURES, ONE_MODEL_ARCHITECTURES, ExpertSpec, Kind


def dependents(experts: Mapping[str, ExpertSpec], name: str) -> list[str]:
    """Names of the experts that need `name`: its adapters, deltas from it, and compositions."""
    return sorted(spec.name for spec in experts.values() if name in spec.references)


def check_references(
    spec: ExpertSpec, experts: Mapping[str, ExpertSpec], *, unsound: Collection[str] = (), where: str = "the registry"
) -> None:
    """Check that the base or members of an expert exist and are of a valid kind; names in `unsound` are skipped.

    Raises:
        UnknownExpert: a base or member does not exist.
        RegistryError: a base is not a model, a member is composed or an embedding model, or members that need one model
            have several.
    """
    for name in spec.references:
        if name in unsound:
            continue
        if (found := experts.get(name)) is None:
            raise UnknownExpert(name, experts, where=where)
        if spec.kind is Kind.ADAPTER and found.kind is not Kind.MODEL:
            raise RegistryError(
                f"the base of {spec.name!r} must be a model, but {name!r} is of kind {found.kind.value!r}"
            )
        if spec.delta_base:
            _check_delta_base(spec, found)
            continue
        if found.kind in (Kind.COMPOSED, Kind.EMBEDDING):
            raise RegistryError(
                f"{name!r}, a member of {spec.name!r}, is of kind {found.kind.value!r}, which cannot be a member"
            )
    if spec.kind is Kind.COMPOSED and not unsound:
        _check_one_base(spec, [experts[name] for name in spec.members])


def _check_delta_base(spec: ExpertSpec, base: ExpertSpec) -> None:
    if base.kind is not Kind.MODEL or base.delta_base:
        what = f"a difference from {base.delta_base!r} itself" if base.delta_base else f"of kind {base.kind.value!r}"
        raise RegistryError(
            f"the base of the delta {spec.name!r} must be a model with its own weights, but {base.name!r} is {what}"
        )


def _check_one_base(spec: ExpertSpec, members: Sequence[ExpertSpec]) -> None:
    if spec.architecture in ONE_BASE_ARCHITECTURES:
        needed, bases = "adapters of one base", {member.base for member in members}
    elif spec.architecture in ONE_MODEL_ARCHITECTURES:
        needed, bases = "one model and adapters of it", {member.base or member.name for member in members}
    else:
        return
    if len(bases) > 1 or None in bases:
        stated = ", ".join(
            f"{member.name!r} is " + (f"an adapter of {member.base!r}" if member.base else f"a {member.kind.value}")
            for member in members
        )
        raise RegistryError(f"the members of {spec.name!r} ({spec.architecture}) must be {needed}, but {stated}")


def check_servable(spec: ExpertSpec) -> None:
    """Refuse a composed expert that no engine serves at registration, not at its first call.

    Raises:
        RegistryError: the message says what to use instead.
    """
    if spec.kind is Kind.COMPOSED and spec.architecture not in COMPOSED_ARCHITECTURES:
        served = ", ".join(COMPOSED_ARCHITECTURES) or "none"
        raise RegistryError(
            f"no engine serves the composed expert {spec.name!r} (architecture: {spec.architecture}; served: {served})."
            " Register its members, and combine their answers by a policy of the configuration, whose `composition` is "
            f"`vote`, `cascade`, `aggregate` or another of docs/compositions.md; it is called as `coe/{spec.name}`"
        )


def check_all_references(experts: Mapping[str, ExpertSpec], removed: Sequence[str]) -> None:
    """Check the references of all experts once `removed` are gone. Raises like `check_references`."""
    for name in removed:
        if name not in experts and (needed_by := dependents(experts, name)):
            raise RegistryError(f"{name!r} cannot be removed: {', '.join(needed_by)} need it; remove these first")
    for spec in experts.values():
        check_references(spec, experts)
