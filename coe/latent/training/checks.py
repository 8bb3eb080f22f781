"""Which experts can be members of a trained composition, from their specs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coe.engines import engine_kind
from coe.engines.latent.decoders import LAYOUTS
from coe.errors import ConfigError, TaskError, Unsupported, WeightsError
from coe.experts import locator
from coe.latent.training.trainer import Job
from registry.errors import SourceError
from registry.lora.combining import ACTIVATED, is_activated, why_not_combined
from registry.spec import ExpertSpec, Kind
from registry.spelling import did_you_mean
from registry.store import Snapshot


def check_members(job: Job, architecture: str) -> None:
    """Refuse members that no composition can be trained with.

    Raises:
        ConfigError: a member is not registered, or is itself composed, remote or an embedding model; or a question
            is for none of the peers.
        Unsupported: another engine serves it, its architecture is not known, or it is an adapter that the composition
            cannot use.
        TaskError: a row states peers that are none, with its line.
    """
    known = job.snapshot.experts
    if unknown := [name for name in job.config.members if name not in known]:
        place = job.file.document.place(("members",))
        raise ConfigError(f"{place}: no expert {unknown[0]!r} is registered{did_you_mean(unknown[0], known)}")
    peers = job.config.members[1:]
    for row in [*job.train, *job.valid]:
        if strange := [name for name in row.peers or () if name not in peers]:
            raise TaskError(
                f"{row.place}: {strange[0]!r} is no peer of this composition; its peers: {', '.join(peers)}"
            )
    _check_asks(job, peers)
    for spec in job.members:
        if spec.kind not in (Kind.MODEL, Kind.ADAPTER):
            raise ConfigError(
                f"{job.file.document.place(('members',))}: {spec.name!r} is of kind {spec.kind.value!r}; members of a "
                "trained composition are models and adapters"
            )
        _check_served(spec, job)
    _check_adapters(job, architecture)


def _check_asks(job: Job, peers: Sequence[str]) -> None:
    """Questions are for peers, where a preset has any."""
    asks: Mapping[str, object] = getattr(job.settings, "asks", {})
    if strange := [name for name in asks if name not in peers]:
        place = job.file.document.place(("settings", "asks", strange[0]))
        raise ConfigError(f"{place}: {strange[0]!r} is no peer of this composition{did_you_mean(strange[0], peers)}")


def _check_adapters(job: Job, architecture: str) -> None:
    """Before anything is loaded."""
    first = job.members[0]
    try:
        reason = why_not_combined(architecture, job.config.members, job.snapshot.experts)
        if reason is None and is_activated(first):
            reason = f"nothing can be trained on {first.name!r}: {ACTIVATED}. Name another first member"
    except SourceError as error:
        raise WeightsError(f"{job.file.document.place(('members',))}: {error}") from error
    if reason is not None:
        raise Unsupported(f"{job.file.document.place(('members',))}: {reason}")


def _check_served(spec: ExpertSpec, job: Job) -> None:
    """Raises Unsupported unless the hf engine serves the expert and its architecture is known."""
    base, place = base_of(spec, job.snapshot), job.file.document.place(("members",))
    kind = engine_kind(base, on_cpu=job.service.engines.auto_on_cpu)
    if kind != "hf":
        raise Unsupported(
            f"{place}: {spec.name!r} is served by the engine {kind!r}, which neither leaves nor reads notes: state "
            f"`engine: hf` for {base.name!r}"
        )
    if base.architecture is not None and base.architecture not in LAYOUTS:
        raise Unsupported(
            f"{place}: {spec.name!r} is a {base.architecture}, whose hidden states cannot be read or changed; "
            f"supported are {', '.join(LAYOUTS)}"
        )


def check_one_base(job: Job) -> None:
    """Raises ConfigError, with the line and the bases, unless all members are of one base."""
    bases = {spec.name: base_of(spec, job.snapshot).name for spec in job.members}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name} on {base}" for name, base in bases.items())
        place = job.file.document.place(("members",))
        raise ConfigError(f"{place}: the preset {job.config.preset!r} needs members of one base: {listed}")


def base_of(spec: ExpertSpec, snapshot: Snapshot) -> ExpertSpec:
    """The expert's base, or itself."""
    return snapshot.experts[spec.base] if spec.base else spec


def base_folder(spec: ExpertSpec, snapshot: Snapshot, find: Callable[[ExpertSpec], Path] | None = None) -> Path:
    """The folder of the base's verified files, as the hf engine reads them: a GGUF file is converted."""
    find = find or locator(snapshot.experts)
    return find(base_of(spec, snapshot).model_copy(update={"engine": "hf"}))


def sizes_of(spec: ExpertSpec, snapshot: Snapshot) -> tuple[int, int]:
    """Width of the hidden states and number of layers, from the files. Raises WeightsError."""
    from transformers import AutoConfig

    folder = base_folder(spec, snapshot)
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{spec.name!r}: the config.json in {folder} cannot be read: {error}") from error
    text = config.get_text_config()
    return int(text.hidden_size), int(text.num_hidden_layers)
