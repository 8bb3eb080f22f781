"""Every problem of a configuration at once: its own fields, its experts files, its routers and its policies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coe.cli.config.memory import too_large
from coe.config import CompositionConfig, Config, PolicyConfig
from coe.engines import Engine, create_engine, engine_kind
from coe.errors import CoeError
from coe.experts import how_to_register, open_snapshot
from coe.local import build_policies
from registry.documents import Document, Loc, load_document, validate
from registry.errors import InvalidSpec, Problem, RegistryError, UnknownExpert
from registry.reconcile import check as check_experts
from registry.spec import ExpertSpec, Kind
from registry.spelling import listing
from registry.store import Snapshot
from routers.constraints import CHAT
from routers.errors import RouterError

if TYPE_CHECKING:
    from pydantic import ValidationError

_OURS = (CoeError, RegistryError, RouterError)
_KNOWN = "the experts of this configuration"
OnExpert = Callable[[str, int], None]
OnBytes = Callable[[int, int], None]


@dataclass(slots=True)
class Findings:
    """What a check found.

    Attributes:
        problems: what the service cannot start or answer with.
        notes: what works, and deserves a look.
        experts, policies: names that the configuration knows.
        broken: experts that are named in a file, and wrong there: no other problem is made of them.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    experts: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    broken: set[str] = field(default_factory=set)


def check_config(path: Path, *, on_expert: OnExpert | None = None, on_bytes: OnBytes | None = None) -> Findings:
    """Check a configuration and all that it names. Files are read and hashed; nothing is downloaded or loaded.

    Args:
        on_expert, on_bytes: see `registry.reconcile.plan`.
    """
    findings = Findings()
    try:
        document = load_document(path)
    except InvalidSpec as error:
        findings.problems += error.problems
        return findings
    config = _read(document, findings)
    snapshot = _experts(document, config, findings, on_expert, on_bytes)
    findings.experts, findings.policies = tuple(snapshot), tuple(config.policies)
    if findings.experts:
        _check_names(document, config, snapshot, findings)
        _check_engines(document, config, snapshot, findings)
        findings.problems += [document.problem(loc, text) for loc, text in too_large(config, snapshot)]
        for name, policy in config.policies.items():
            _check_policy(document, name, policy, snapshot, findings)
    if not config.policies:
        text = "there is no policy, so requests must name an expert: `auto` has nothing to route with"
        findings.notes.append(document.problem((), text))
    findings.problems.sort(key=lambda problem: (problem.file, problem.line))
    return findings


def _read(document: Document, findings: Findings) -> Config:
    """The configuration; where it is wrong, as much of it as can be checked further."""
    try:
        return validate(document, Config)
    except InvalidSpec as error:
        findings.problems += error.problems
    if not isinstance(document.value, dict):
        return Config()
    return _salvaged(document.value, document.folder)


def _salvaged(value: Mapping[str, Any], folder: Path) -> Config:
    """The sound sections of a configuration: what pydantic refuses is left out, a policy by itself."""
    from pydantic import ValidationError

    left = {key: dict(part) if key == "policies" and isinstance(part, dict) else part for key, part in value.items()}
    for _ in range(len(left) + len(left.get("policies") or ()) + 1):
        try:
            return Config.model_validate(left, context={"folder": folder})
        except ValidationError as error:
            _leave_out(left, error)
    return Config()


def _leave_out(value: dict[str, Any], error: ValidationError) -> None:
    for detail in error.errors(include_url=False):
        match detail["loc"]:
            case ("policies", str(name), *_) if isinstance(value.get("policies"), dict):
                value["policies"].pop(name, None)
            case (key, *_):
                value.pop(str(key), None)
            case _:  # `default_policy` that is no policy (any more); `registry` beside `experts`
                value["default_policy"] = next(iter(value.get("policies") or ["default"]))
                if "experts" in value:
                    value.pop("registry", None)


def _experts(
    document: Document, config: Config, findings: Findings, on_expert: OnExpert | None, on_bytes: OnBytes | None
) -> Snapshot:
    """The experts that the configuration names, each file checked."""
    if not config.experts:
        return _registered(document, config, findings)
    known: dict[str, ExpertSpec] = {}
    for index, path in enumerate(config.experts):
        loc: Loc = ("experts", index)
        if not path.is_file():
            findings.problems.append(document.problem(loc, f"there is no such file: {path}"))
            continue
        try:
            experts = load_document(path)
        except InvalidSpec as error:
            findings.problems += error.problems
            continue
        checked = check_experts(experts, known, on_expert=on_expert, on_bytes=on_bytes)
        findings.problems += checked.problems
        known |= checked.experts
        findings.broken |= checked.broken
        if checked.absent:
            text = f"downloaded from the Hugging Face hub at the first start: {listing(checked.absent)}"
            findings.notes.append(Problem(str(path), text))
        findings.notes += _missing_keys(experts, checked.experts)
    return Snapshot(0, known)


def _registered(document: Document, config: Config, findings: Findings) -> Snapshot:
    try:
        snapshot = open_snapshot(config)
    except RegistryError as error:
        findings.problems.append(document.problem(("registry",), str(error)))
        return Snapshot(0, {})
    if not len(snapshot):
        text = f"no expert is registered there: {how_to_register(config)}"
        findings.problems.append(document.problem(("registry",), text))
    return snapshot


def _missing_keys(document: Document, experts: Mapping[str, ExpertSpec]) -> Iterator[Problem]:
    for index, entry in enumerate(document.value["experts"] if experts else ()):
        name = entry.get("name") if isinstance(entry, dict) else None
        spec = experts.get(name) if isinstance(name, str) else None
        named: list[tuple[Loc, str | None]] = [(("api_key_env",), spec.api_key_env)] if spec is not None else []
        if spec is not None:
            named += [(("endpoints", i, "key_env"), each.key_env) for i, each in enumerate(spec.endpoints)]
        for at, variable in named:
            if variable and not os.environ.get(variable):
                text = f"the environment variable {variable} is not set: {name!r} cannot be called until it is"
                yield document.problem(("experts", index, *at), text)


def _check_names(document: Document, config: Config, snapshot: Snapshot, findings: Findings) -> None:
    """Experts that `host` and `serve` name."""
    named: list[tuple[Loc, str]] = [(("host", "pins", i), pin) for i, pin in enumerate(config.host.pins)]
    for number, hosts in enumerate(config.serve.pools):
        at: Loc = ("serve", "pools", number)
        named += [((*at, "experts", i), name) for i, name in enumerate(hosts.experts or ())]
        named += [((*at, "pins", i), name) for i, name in enumerate(hosts.pins or ())]
    for loc, name in named:
        if name not in snapshot and name not in findings.broken:
            findings.problems.append(document.problem(loc, str(UnknownExpert(name, snapshot, where=_KNOWN))))


def _check_engines(document: Document, config: Config, snapshot: Snapshot, findings: Findings) -> None:
    """Engines that experts name, or that serve composed or fake ones: they exist, and take their settings."""
    experts_of: dict[str, list[str]] = {}
    for name, spec in snapshot.experts.items():
        # The engines of other experts take seconds to import.
        if spec.engine is not None or spec.kind is Kind.COMPOSED or spec.source.startswith("fake://"):
            experts_of.setdefault(engine_kind(spec), []).append(name)
    where: Loc = ("experts",) if config.experts else ("registry",)
    for kind, experts in experts_of.items():
        settings = config.engines.settings(kind)
        loc: Loc = ("engines", kind) if settings else where
        try:
            engine = create_engine(kind, **settings)
        except CoeError as error:
            findings.problems.append(document.problem(loc, f"engine of {listing(experts)}: {error}"))
            continue
        served = [spec for name, spec in snapshot.experts.items() if name in experts or spec.base in experts]
        findings.problems += [document.problem(where, why) for why in _refusals(engine, served)]
    findings.problems += [document.problem(where, why) for why in _members_elsewhere(snapshot)]


def _members_elsewhere(snapshot: Snapshot) -> Iterator[str]:
    """Members of composed experts that another engine serves than the composed expert."""
    for spec in snapshot.experts.values():
        for member in (snapshot.experts[name] for name in spec.members):
            weights = snapshot.experts[member.base] if member.base else member
            kind, needed = engine_kind(weights), engine_kind(spec)
            if kind != needed:
                yield (
                    f"{spec.name!r} combines {member.name!r}, which the engine {kind!r} serves: members are served by "
                    f"{needed!r}; state `engine: {needed}` for {weights.name!r}"
                )


def _refusals(engine: Engine, specs: Iterable[ExpertSpec]) -> Iterator[str]:
    """What the engine refuses of the experts, if it can check them before it loads them."""
    check: Callable[[ExpertSpec], None] | None = getattr(engine, "check_expert", None)
    if check is None:
        return
    for spec in specs:
        try:
            check(spec)
        except CoeError as error:
            yield str(error)


def _check_policy(document: Document, name: str, policy: PolicyConfig, snapshot: Snapshot, findings: Findings) -> None:
    """One problem for each part of a policy that is wrong: its router or expert, its composition, its fallback."""
    loc: Loc = ("policies", name)
    plain = {"composition": CompositionConfig(), "fallback": None}
    if policy.router is not None:
        _try(document, (*loc, "router"), policy.model_copy(update=plain), snapshot, findings)
    for part, expert in (("expert", policy.expert), ("fallback", policy.fallback)):
        if expert is not None and expert not in findings.broken and (why := _cannot_answer(expert, snapshot)):
            findings.problems.append(document.problem((*loc, part), why))
    answering = next((expert for expert in snapshot if _cannot_answer(expert, snapshot) is None), None)
    if answering is None:
        findings.problems.append(document.problem(loc, "none of the experts can answer a chat request"))
    else:
        alone = policy.model_copy(update={"router": None, "expert": answering, "fallback": None})
        _try(document, (*loc, "composition"), alone, snapshot, findings)


def _try(document: Document, loc: Loc, policy: PolicyConfig, snapshot: Snapshot, findings: Findings) -> None:
    """Build what the policy needs; errors become problems, warnings become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            build_policies({str(loc[1]): policy}, snapshot)
        except _OURS as error:
            findings.problems.append(document.problem(loc, str(error)))
    findings.notes += [document.problem(loc, text) for text in dict.fromkeys(str(one.message) for one in caught)]


def _cannot_answer(expert: str, snapshot: Snapshot) -> str | None:
    if expert not in snapshot:
        return str(UnknownExpert(expert, snapshot, where=_KNOWN))
    spec = snapshot.experts[expert]
    if CHAT not in spec.capabilities or spec.kind is Kind.EMBEDDING:
        return f"{expert!r} cannot {CHAT}, so it cannot answer"
    return None
