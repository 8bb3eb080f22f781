"""PHATGOOSE (arXiv 2402.05859): one gate vector for each adapter and layer, trained with the adapter frozen.

    training:  output = W h + sigmoid(v_e . h) s_e B_e A_e h   on the rows of adapter e, only v_e is trained
    serving:   logit_e = LN(h) . LN(v_e) / sqrt(d);   softmax over the top k

LN standardises a vector to mean 0 and variance 1, without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

from coe.engines.hf.lora.gates.gate import AdaptedLayer, SoftmaxGate

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings


class Phatgoose(SoftmaxGate):
    """The gate `phatgoose`.

    In training mode, `query` is the share of each member in the rows, (n_rows, n_members): 1 for the member that a row
    belongs to. Weights are then sigmoids, so one batch trains the gates of all members.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__(layers, members, settings)
        self.v = nn.ParameterList(torch.zeros(len(members), layer.n_in) for layer in layers)

    def forward(self, layer: int, h: Tensor, query: Tensor | None = None) -> Tensor:
        """Weights of the members, see `Gate.forward`."""
        if not self.training:
            return super().forward(layer, h, query)
        if query is None:
            raise ValueError("the rows of a training batch have no members")
        weights: Tensor = linear(h.float(), self.v[layer]).sigmoid() * query[:, None]
        return weights

    def logits(self, layer: int, h: Tensor) -> Tensor:
        """Standardised products of the input with the gate vectors."""
        v = self.v[layer]
        width = (v.shape[-1],)
        logits: Tensor = linear(layer_norm(h.float(), width), layer_norm(v, width)) / v.shape[-1] ** 0.5
        return logits

    def weights(self) -> dict[str, Tensor]:
        """The gate vectors of each layer."""
        return self._by_layer("v", list(self.v))
