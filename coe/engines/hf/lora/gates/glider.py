"""Glider (arXiv 2410.07172): PHATGOOSE's token-level logits plus a query-level term.

    logit_e = phatgoose_e(h) + scale * cos(embedding of expert e's instruction, embedding of the query)

The paper lets a large model write both instructions; here the query is embedded itself, by the project's encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from coe.engines.hf.lora.gates.gate import AdaptedLayer
from coe.engines.hf.lora.gates.phatgoose import Phatgoose
from coe.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings


class Glider(Phatgoose):
    """The gate `glider`. Its artifact holds the embeddings of the instructions, (n_members, n)."""

    needs_query = True

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__(layers, members, settings)
        self.instructions: Tensor
        self.register_buffer("instructions", torch.zeros(len(members), 0), persistent=False)

    def load(self, tensors: Mapping[str, Tensor], *, expert: str) -> None:
        """See `Gate.load`."""
        if (found := tensors.get("instructions")) is not None and found.ndim == 2:
            self.instructions = torch.zeros(len(self.members), found.shape[1], device=self.instructions.device)
        super().load(tensors, expert=expert)

    def query_logits(self, queries: Tensor) -> Tensor | None:
        """The cosines, scaled. Raises WeightsError if the embeddings are of another encoder."""
        if self.settings.scale == 0:
            return None
        if (trained := self.instructions.shape[1]) != (given := queries.shape[-1]):
            raise WeightsError(
                f"the gate 'glider' was trained on embeddings of {trained} numbers, and the encoder "
                f"{self.settings.encoder!r} gives {given}: use that of the training"
            )
        return self.settings.scale * normalize(queries.float()) @ normalize(self.instructions).mT

    def weights(self) -> dict[str, Tensor]:
        """The gate vectors of each layer, and the embeddings of the instructions."""
        return super().weights() | {"instructions": self.instructions}
