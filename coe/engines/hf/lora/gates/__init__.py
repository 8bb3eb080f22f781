"""Gates: they weigh the LoRA adapters of a mixture, for every token and adapted layer. One file, one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Final

from coe.engines.hf.lora.gates.settings import MixSettings, needs_training
from coe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.gate import AdaptedLayer, Gate

GATES: Final[Mapping[str, str]] = {
    "arrow": "coe.engines.hf.lora.gates.arrow:Arrow",
    "phatgoose": "coe.engines.hf.lora.gates.phatgoose:Phatgoose",
    "glider": "coe.engines.hf.lora.gates.glider:Glider",
    "trained": "coe.engines.hf.lora.gates.trained:Trained",
    "fixed": "coe.engines.hf.lora.gates.fixed:Fixed",
}
"""Gate -> its class, imported on first use."""


def build_gate(
    layers: Sequence[AdaptedLayer],
    members: Sequence[str],
    settings: MixSettings,
    tensors: Mapping[str, Tensor] | None,
    *,
    expert: str,
) -> Gate:
    """The gate of a composed expert, in evaluation mode.

    Args:
        tensors: trained weights of its artifact; None without an artifact.

    Raises:
        WeightsError: the gate needs trained weights, and there is no artifact, or its weights do not fit.
    """
    gate = new_gate(layers, members, settings)
    if tensors is not None:
        gate.load(tensors, expert=expert)
    elif settings.is_trained:
        raise WeightsError(needs_training(expert, settings.gate))
    return gate.eval().requires_grad_(False)


def new_gate(layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> Gate:
    """An untrained gate."""
    module, _, name = GATES[settings.gate].partition(":")
    gate: Gate = getattr(import_module(module), name)(layers, members, settings)
    return gate
