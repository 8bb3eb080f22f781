"""Arrow (arXiv 2405.11157): routing by the directions that each adapter's update responds to most. Nothing is trained.

    v_e = first right singular vector of s_e B_e A_e;   logit_e = |h . v_e|;   softmax(logits / T) over the top k

The sign of a singular vector is arbitrary, hence the absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from coe.engines.hf.lora.gates.gate import AdaptedLayer, SoftmaxGate

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings


class Arrow(SoftmaxGate):
    """The gate `arrow`."""

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__(layers, members, settings)
        for number, layer in enumerate(layers):
            self.register_buffer(f"prototypes{number}", _prototypes(layer), persistent=False)

    def logits(self, layer: int, h: Tensor) -> Tensor:
        """Absolute products of the input with the prototypes."""
        prototypes: Tensor = getattr(self, f"prototypes{layer}")
        return torch.nn.functional.linear(h.float(), prototypes).abs()


def _prototypes(layer: AdaptedLayer) -> Tensor:
    """(n_members, n_in) unit vectors; 0 where a member has no update."""
    rows = [torch.zeros(layer.n_in) if pair is None else first_right_singular_vector(*pair) for pair in layer.updates]
    return torch.stack([row.cpu() for row in rows])


def first_right_singular_vector(a: Tensor, b: Tensor) -> Tensor:
    """Of B A, (n_in,) float32, up to its sign; 0 if the product is 0. The (n_out, n_in) product is never formed.

    With B = Q_b R_b and A^T = Q_a R_a, B A = Q_b (R_b R_a^T) Q_a^T: the singular vectors of the small (r, r) matrix,
    rotated by Q_a.

    Args:
        a: (r, n_in). b: (n_out, r).
    """
    _, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().mT)
    _, values, right = torch.linalg.svd(r_b @ r_a.mT)
    first: Tensor = q_a @ right[0] * (values[0] > 0)
    return first
