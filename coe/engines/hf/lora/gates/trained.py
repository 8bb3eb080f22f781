"""One trained router for each layer; its settings cover several papers.

    logits = LN(h) W^T   (+ noise in training);   softmax;   the top k, or as many as the entropy rule takes

MoLA (arXiv 2402.08562): `experts_per_layer`, top_k 2. LLaVA-MoLE (2401.16160): top_k 1, balance. LoRA-Mixer
(2507.00029): top_k 2, balance with a sign. DynMoLE (2504.00661): `entropy`. LoRAMoE (2312.09979): top_k null, localized
balance. In these papers adapters and router are trained together; here the adapters are given and stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from coe.engines.hf.lora.gates.gate import AdaptedLayer, SoftmaxGate

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings

_SPREAD: Final = 0.02


class Trained(SoftmaxGate):
    """The gate `trained`. Its first weights are small and random, so that no adapter is preferred."""

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__(layers, members, settings)
        random = torch.Generator().manual_seed(0)
        self.router = nn.ParameterList(
            _SPREAD * torch.randn(len(members), layer.n_in, generator=random) for layer in layers
        )

    def logits(self, layer: int, h: Tensor) -> Tensor:
        """The router's scores of the standardised input."""
        weight = self.router[layer]
        logits = linear(layer_norm(h.float(), (weight.shape[-1],)), weight)
        if self.training and self.settings.noise:
            noise = torch.randn(logits.shape, generator=self.chance, device=logits.device)
            logits = logits + self.settings.noise * noise
        return logits

    def weights(self) -> dict[str, Tensor]:
        """The routers of each layer."""
        return self._by_layer("router", list(self.router))
