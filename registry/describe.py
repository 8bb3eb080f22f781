"""Complete an expert's spec: facts read from its files, price, digest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from registry.chat_templates import TOOLS, renders_tools
from registry.command_files import command_bytes, command_digest, hash_command
from registry.commands import ServerCommand
from registry.composed import changed_member, composed_defaults, composed_facts
from registry.deltas.manifest import Delta, is_delta, read_delta
from registry.deltas.records import other_records, restored_records
from registry.digest import digest_files, digest_of, digest_of_text, hash_files
from registry.endpoints import places
from registry.errors import SourceError
from registry.headers import read_json
from registry.inspection import Facts, card_licence, inspect
from registry.lora.check import read_lora
from registry.lora.combining import why_not_combined
from registry.sources import SourceKind, has_files, pinned, resolve, resolve_here, source_kind
from registry.spec import ExpertSpec, Kind, Price

REASONING = "reasoning"
_READ_FROM_FILES = (
    "architecture",
    "quantization",
    "parameters_total",
    "parameters_active",
    "size_bytes",
    "context_length",
)


def describe(
    draft: ExpertSpec,
    base: ExpertSpec | None = None,
    *,
    experts: Mapping[str, ExpertSpec] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> ExpertSpec:
    """Complete a draft with facts from its files; downloads files that are on the hub.

    Args:
        draft: its source is absolute (`sources.absolute_source`).
        base: the described base, for adapters.
        experts: the described experts, by name, for composed ones: their members and these members' bases.
        on_bytes: called with (bytes hashed, bytes in all).

    Raises:
        SourceError: the files cannot be used, or contradict the draft.
    """
    if draft.kind is Kind.COMPOSED:
        return _describe_composed(draft, experts or {}, on_bytes)
    if not has_files(draft):
        return _describe_without_files(draft, base, on_bytes)
    path = resolve(draft)
    facts = adapter_facts(draft, path, base) if draft.kind is Kind.ADAPTER else _model_facts(draft, path)
    facts |= delta_facts(draft, path, experts or {})
    if source_kind(draft.source, engine=draft.engine) is SourceKind.HUB:
        source, commit = pinned(draft.source, path)
        facts |= {"source": source, "revision": commit}
    _refuse_contradictions(draft, facts, path)
    draft = _with_parsers(_with_tools(draft, path, base), base)
    files = hash_files(path, on_bytes=_counter(path, on_bytes))
    return _complete(draft, facts | {"files": files}, digest_of(files), base)


def _describe_composed(
    draft: ExpertSpec, experts: Mapping[str, ExpertSpec], on_bytes: Callable[[int, int], None] | None
) -> ExpertSpec:
    facts: dict[str, Any] = {}
    if experts.keys() >= {*draft.members}:
        facts = composed_defaults(draft, experts)
        able = experts[draft.members[0]].capabilities  # it renders the prompt, and its tokens are the answer
        draft = draft.model_copy(update={"capabilities": draft.capabilities | able})
    if not has_files(draft):
        if facts:
            _check_adapters(draft, None, experts)
        settings = json.dumps(draft.settings, sort_keys=True)
        return _complete(draft, facts, digest_of_text("composed", draft.architecture, settings, *draft.members))
    path = resolve(draft)
    draft = draft.model_copy(update=composed_facts(draft, path, experts))
    _check_adapters(draft, path, experts)
    files = hash_files(path, on_bytes=_counter(path, on_bytes))
    return _complete(draft, facts | {"files": files}, digest_of(files))


def check_composed(spec: ExpertSpec, experts: Mapping[str, ExpertSpec]) -> None:
    """Check that a registered composed expert can still use its members.

    Args:
        experts: by name, as they are now.

    Raises:
        SourceError: it was trained with other contents of a member, or cannot combine one.
    """
    if reason := changed_member(spec.trained_with, experts):
        raise SourceError(reason)
    _check_adapters(spec, resolve_here(spec) if has_files(spec) else None, experts)


def _check_adapters(spec: ExpertSpec, artifact: Path | None, experts: Mapping[str, ExpertSpec]) -> None:
    if reason := why_not_combined(spec.architecture, spec.members, experts, artifact=artifact):
        raise SourceError(f"{spec.name!r}: {reason}")


def _with_tools(draft: ExpertSpec, path: Path, base: ExpertSpec | None) -> ExpertSpec:
    """The draft with the capability `tools` if its chat template renders them.

    An adapter without a template has that of its base.
    """
    if draft.kind is Kind.EMBEDDING:
        return draft
    renders = renders_tools(path)
    if renders is None and base is not None:
        renders = TOOLS in base.capabilities
    return draft.model_copy(update={"capabilities": draft.capabilities | {TOOLS}}) if renders else draft


def _with_parsers(draft: ExpertSpec, base: ExpertSpec | None) -> ExpertSpec:
    """The draft with the capabilities that its parsers state; an adapter reasons as its base."""
    stated = {TOOLS} if draft.tool_call_parser else set()
    if draft.reasoning_parser or (base is not None and base.reasoning_parser):
        stated.add(REASONING)
    return draft.model_copy(update={"capabilities": draft.capabilities | stated}) if stated else draft


def _counter(path: Path, on_bytes: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    """A callback for steps that reports the running total of bytes."""
    return None if on_bytes is None else _total(sum(file.stat().st_size for file in digest_files(path)), on_bytes)


def _total(total: int, on_bytes: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    if on_bytes is None:
        return None
    done = 0

    def count(step: int) -> None:
        nonlocal done
        done += step
        on_bytes(done, total)

    return count


def _describe_command(
    draft: ExpertSpec, server: ServerCommand, model: str, on_bytes: Callable[[int, int], None] | None
) -> ExpertSpec:
    total, weight_bytes = command_bytes(server)
    files = hash_command(server, on_bytes=_total(total, on_bytes))
    facts = {"model": model, "files": files, "size_bytes": weight_bytes or None}
    return _complete(draft, facts, command_digest(server, model, files))


def _describe_without_files(
    draft: ExpertSpec, base: ExpertSpec | None, on_bytes: Callable[[int, int], None] | None
) -> ExpertSpec:
    if draft.kind is Kind.REMOTE:
        if draft.context_length is None:
            raise SourceError("a remote expert needs `context_length` (tokens), which cannot be read from its endpoint")
        model = draft.model or draft.name
        if draft.server is not None:
            return _describe_command(draft, draft.server, model, on_bytes)
        if len(found := places(draft.endpoints, model)) > 1:
            parts = [text for place in found for text in place]
            return _complete(draft, {"model": model}, digest_of_text("endpoints", *parts, draft.revision or ""))
        return _complete(draft, {"model": model}, digest_of_text(draft.source, model, draft.revision or ""))
    engine = [draft.engine] if draft.engine else []
    inherited = {} if base is None else {name: getattr(base, name) for name in _READ_FROM_FILES}
    inherited |= {name: value for name in _READ_FROM_FILES if (value := getattr(draft, name)) is not None}
    return _complete(draft, inherited, digest_of_text(draft.source, draft.base or "", *engine), base)


def _model_facts(draft: ExpertSpec, path: Path) -> dict[str, Any]:
    return _spec_fields(inspect(path, embedding=draft.kind is Kind.EMBEDDING))


def adapter_facts(draft: ExpertSpec, path: Path, base: ExpertSpec | None) -> dict[str, Any]:
    """Facts from the files of an adapter. Raises SourceError if the adapter does not fit `base`."""
    if base is None:
        raise SourceError(f"the base {draft.base!r} of {draft.name!r} is needed to check that the adapter fits")
    if not has_files(base) or base.kind is not Kind.MODEL:
        raise SourceError(f"the base {base.name!r} ({base.kind.value}) has no weights for an adapter")
    if not path.is_dir():
        raise SourceError(
            f"{path} is not a folder: an adapter is a folder with adapter_config.json and its safetensors"
        )
    base_facts = inspect(resolve(base))
    tensors = read_lora(path, base.name, base_facts)
    own = sum(tensor.elements for tensor in tensors.values())
    return {
        "architecture": base_facts.architecture,
        "quantization": base_facts.quantization,
        "parameters_total": own,
        "parameters_active": base_facts.parameters_active + own,
        "size_bytes": sum(tensor.n_bytes for tensor in tensors.values()),
        "context_length": base.context_length,
        "licence": card_licence(path),
    }


def delta_facts(draft: ExpertSpec, path: Path, experts: Mapping[str, ExpertSpec]) -> dict[str, Any]:
    """What a delta restores; nothing for other files.

    Raises:
        SourceError: `delta_base` is missing, superfluous, or names a model with other contents.
    """
    if not is_delta(path):
        if draft.delta_base:
            raise SourceError(f"{path} is not a delta: leave `delta_base` of {draft.name!r} out")
        return {}
    delta = read_delta(path)
    check_delta_base(draft, delta, experts)
    return {"restores": digest_of([*restored_records(delta), *other_records(path)])}


def check_delta_base(spec: ExpertSpec, delta: Delta, experts: Mapping[str, ExpertSpec]) -> None:
    """Check that the named base of a delta has the contents that it was made from.

    Raises:
        SourceError: it has not, or it is not named.
    """
    same = [name for name, expert in experts.items() if expert.digest == delta.base]
    hint = f"`delta_base: {same[0]}` is" if same else f"register that expert first (its digest is {delta.base}); it is"
    if delta.base is None:
        if spec.delta_base:
            raise SourceError(f"the delta of {spec.name!r} needs no base: leave `delta_base` out")
    elif spec.delta_base is None:
        raise SourceError(f"{spec.name!r} is stored as a difference from another model: {hint} what it was made from")
    elif spec.delta_base not in same:
        raise SourceError(
            f"{spec.name!r} is stored as a difference from other contents than {spec.delta_base!r} has now: {hint} "
            "what it was made from"
        )


def _spec_fields(facts: Facts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in (*_READ_FROM_FILES, "licence")}


def _refuse_contradictions(draft: ExpertSpec, facts: Mapping[str, Any], path: Path) -> None:
    """Refuse stated facts that contradict the files, except a shorter context or parameter counts of packed weights."""
    packed = (
        path.is_dir() and (path / "config.json").exists() and "quantization_config" in read_json(path / "config.json")
    )
    for name in _READ_FROM_FILES:
        stated, read = getattr(draft, name), facts[name]
        shorter = name == "context_length" and (read is None or stated is None or stated < read)
        if stated in (None, read) or shorter or (packed and name.startswith("parameters")):
            continue
        raise SourceError(f"`{name}` is stated as {stated}, but the files in {path} say {read}; leave it out")


def _complete(draft: ExpertSpec, facts: Mapping[str, Any], digest: str, base: ExpertSpec | None = None) -> ExpertSpec:
    if draft.digest not in (None, digest):
        raise SourceError(
            f"the digest of {draft.name!r} is {digest}, but the spec states {draft.digest}: leave it out, or restore "
            "the files"
        )
    pinned_fields = {"source", "revision", "files"}
    stated = {name for name in facts if name not in pinned_fields and getattr(draft, name) is not None}
    update = {name: value for name, value in facts.items() if name not in stated}
    described = draft.model_copy(update=update | {"digest": digest, "version": None})
    if described.price is None and described.kind is not Kind.REMOTE:
        described = described.model_copy(update={"price": _default_price(described, base)})
    return described


def _default_price(spec: ExpertSpec, base: ExpertSpec | None) -> Price | None:
    active = spec.parameters_active
    if active is None:
        return None
    if base is not None and base.price is not None and base.parameters_active:
        return base.price.scaled(active / base.parameters_active)
    return Price.of_parameters(active)
