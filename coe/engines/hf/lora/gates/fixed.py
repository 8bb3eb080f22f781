"""One weight for each adapter, the same for all tokens and layers: LoraHub (arXiv 2307.13269) and MoLE by the query.

    output = W h + sum_e w_e s_e B_e A_e h

LoraHub weighs the matrices A and B; here whole updates are weighed, so that one adapter with weight 1 is that adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from coe.engines.hf.lora.gates.gate import AdaptedLayer, Gate

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings


class Fixed(Gate):
    """The gate `fixed`: weights of the settings, or of an artifact."""

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__(layers, members, settings)
        self.w = nn.Parameter(torch.tensor([float(settings.weights.get(name, 0.0)) for name in members]))

    def forward(self, layer: int, h: Tensor, query: Tensor | None = None) -> Tensor:
        """The weights of the members, whatever the input."""
        return self.w.expand(*h.shape[:-1], -1)

    def weights(self) -> dict[str, Tensor]:
        """One weight for each member."""
        return {"w": self.w.data}
