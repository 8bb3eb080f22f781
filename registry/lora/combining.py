"""Which LoRA adapters a composed expert can combine, decided from their files when it is registered.

    lora-mix        weighs the low-rank updates of linear layers for each token: its members have nothing else
    mot, logits     members take steps between those of other requests, each with a forward of its own
    cache           the first member reads its prompt in parts, with entries of its peers between them

An aLoRA (arXiv 2504.12397) acts from its invocation tokens on, and finds them in a whole prompt: the last three cannot
have one where they say. All other kinds of adapters answer in a batch of their own where they cannot be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from registry.inspection import inspect
from registry.lora.check import plan_of
from registry.lora.config import ADAPTER_CONFIG, read_lora_config
from registry.lora.plan import LoraPlan, is_fused
from registry.sources import has_files, resolve_here
from registry.spec import ExpertSpec, Kind

OWN_ADAPTER: Final = "adapter"
"""Folder inside an artifact: an adapter that takes the place of the first member's."""
ACTIVATED: Final = "it acts from its invocation tokens on (aLoRA)"
_MIXED: Final = frozenset({"lora-mix"})
_IN_STEP: Final = frozenset({"mot", "logits"})
_IN_PARTS: Final = frozenset({"cache"})


def why_not_mixed(plan: LoraPlan) -> str | None:
    """What an adapter has beside low-rank updates of linear layers, which is all that a gate can weigh."""
    config = plan.config
    reasons = {
        ACTIVATED: config.alora_invocation_tokens,
        "it replaces parameters of the base beside its low-rank matrices": plan.replaced or plan.rows,
        "it is a variant of LoRA, such as DoRA": config.use_dora,
        "it has biases": config.lora_bias,
        "it adapts an embedding, which is not a linear layer": any("lora_embedding" in each for each in plan.loaded),
        "it adapts fused experts": any(map(is_fused, plan.ranks)),
    }
    return next((reason for reason, found in reasons.items() if found), None)


def why_not_combined(
    architecture: str | None,
    members: Sequence[str],
    experts: Mapping[str, ExpertSpec],
    *,
    artifact: Path | None = None,
) -> str | None:
    """Why an architecture cannot combine these members: the first adapter that it cannot use, and the reason.

    Files that are not here are skipped: the engine refuses such an adapter when it loads it.

    Args:
        experts: by name; the members and their bases are among them.
        artifact: folder of the composed expert.

    Raises:
        SourceError: an adapter is damaged, or does not fit its base.
    """
    own = artifact / OWN_ADAPTER if artifact else None
    if architecture in _IN_PARTS and own is not None and (own / ADAPTER_CONFIG).is_file():
        return f"{architecture!r} cannot use the adapter in {own}: {ACTIVATED}" if _is_activated(own) else None
    for member in (experts[name] for name in (members[:1] if architecture in _IN_PARTS else members)):
        reason = _why_not(architecture, member, experts) if member.kind is Kind.ADAPTER else None
        if reason is not None:
            return f"{architecture!r} cannot use the adapter {member.name!r}: {reason}. Name another member instead"
    return None


def is_activated(spec: ExpertSpec) -> bool:
    """Whether an expert is an aLoRA whose files are here."""
    if spec.kind is not Kind.ADAPTER or not has_files(spec):
        return False
    folder = resolve_here(spec)
    return folder is not None and _is_activated(folder)


def _why_not(architecture: str | None, member: ExpertSpec, experts: Mapping[str, ExpertSpec]) -> str | None:
    if architecture in _IN_STEP | _IN_PARTS:
        return ACTIVATED if is_activated(member) else None
    base = experts[member.base or ""]
    if architecture not in _MIXED or not (has_files(member) and has_files(base)):
        return None
    folder, weights = resolve_here(member), resolve_here(base)
    if folder is None or weights is None:
        return None
    return why_not_mixed(plan_of(folder, inspect(weights)))


def _is_activated(folder: Path) -> bool:
    return bool(read_lora_config(folder).alora_invocation_tokens)
