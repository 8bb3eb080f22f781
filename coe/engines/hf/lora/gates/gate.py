"""What every gate shares: the adapted layers it weighs adapters for, and softmax routing with a choice of adapters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from coe.engines.hf.lora.gates.choice import choose
from coe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import MixSettings

Observer = Callable[[int, "Tensor", "Tensor"], None]


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A linear layer of the base, and what the members of a mixture add to it.

    Attributes:
        name: in the base, such as `model.layers.3.self_attn.q_proj`.
        depth: its decoder layer as a share of all, in [0, 1).
        updates: by member: A (r, n_in) and scaled B (n_out, r); None where a member does not adapt this layer.
    """

    name: str
    depth: float
    updates: tuple[tuple[Tensor, Tensor] | None, ...]

    @property
    def n_in(self) -> int:
        """Width of the layer's input."""
        return int(next(pair[0].shape[1] for pair in self.updates if pair is not None))

    def norms(self) -> Tensor:
        """Frobenius norm of each member's update B A, (n_members,); 0 where there is none."""
        return torch.tensor([0.0 if pair is None else _norm(*pair) for pair in self.updates])


def _norm(a: Tensor, b: Tensor) -> float:
    """|B A|_F without the product: its square is the trace of (B^T B)(A A^T)."""
    gram_b, gram_a = (m.double() for m in (b.float().mT @ b.float(), a.float() @ a.float().mT))
    return math.sqrt(max(0.0, float((gram_b * gram_a.mT).sum())))


class Gate(nn.Module, ABC):
    """Weights of the members of a mixture, for every adapted layer and token.

    Trained weights are parameters, one a layer, all in float32.

    Args:
        layers: the adapted layers, in the order of the model.
        members: names of the members.
        settings: of the mixture.

    Attributes:
        numbers: number of each adapted layer, by its name.
        observer: in training: called with the layer's number, the probabilities and the weights, (n_rows, n_tokens,
            n_members) each.
    """

    needs_query = False
    """Whether it reads an embedding of the query."""
    chance: torch.Generator | None = None
    """Of noise in training."""

    def __init__(self, layers: Sequence[AdaptedLayer], members: Sequence[str], settings: MixSettings) -> None:
        super().__init__()
        self.names = [layer.name for layer in layers]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.members = tuple(members)
        self.settings = settings
        self.observer: Observer | None = None
        hidden = torch.stack([_unused(layer, settings.experts_per_layer) for layer in layers])
        self._any_hidden = hidden.any(dim=-1).tolist()
        self._hidden: Tensor
        self.register_buffer("_hidden", hidden, persistent=False)

    @abstractmethod
    def forward(self, layer: int, h: Tensor, query: Tensor | None = None) -> Tensor:
        """Weights of the members, (n_rows, n_tokens, n_members) float32.

        Args:
            layer: number of the adapted layer.
            h: (n_rows, n_tokens, n_in) its input.
            query: (n_rows, n_members) what `query_logits` gave for these rows.
        """

    def query_logits(self, queries: Tensor) -> Tensor | None:
        """What embeddings (n_rows, n) of the queries add to the logits, (n_rows, n_members); once per row."""
        return None

    def load(self, tensors: Mapping[str, Tensor], *, expert: str) -> None:
        """Take trained weights over: {"<parameter>.<layer>": tensor}, those that `weights` returns.

        Raises:
            WeightsError: tensors are missing, not used, of other shapes, or not finite.
        """
        own = self.weights()
        problems = [f"lacks {name}" for name in own.keys() - tensors.keys()]
        problems += [f"has {name}, which is not used" for name in tensors.keys() - own.keys()]
        problems += [
            f"has {name} of shape {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ]
        problems += [f"has values in {n} that are not finite" for n, t in tensors.items() if not t.isfinite().all()]
        if problems:
            raise WeightsError(
                f"the weights of {expert!r} do not fit its members ({', '.join(self.members)}): its artifact "
                f"{'; '.join(sorted(problems)[:3])}: train it again with `coe latent train`"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def weights(self) -> dict[str, Tensor]:
        """Its trained tensors by name; they share memory with the gate."""
        return {}

    def _by_layer(self, name: str, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        return {f"{name}.{layer}": p.data for layer, p in zip(self.names, parameters, strict=True)}


class SoftmaxGate(Gate):
    """A gate that scores the members for each token, and weighs them by a softmax."""

    def forward(self, layer: int, h: Tensor, query: Tensor | None = None) -> Tensor:
        """Weights of the members by their scores; see `Gate.forward`."""
        logits = self.logits(layer, h)
        if query is not None:
            logits = logits + query[:, None]
        return self.weigh(layer, logits)

    @abstractmethod
    def logits(self, layer: int, h: Tensor) -> Tensor:
        """Scores of the members, (n_rows, n_tokens, n_members) float32."""

    def weigh(self, layer: int, logits: Tensor) -> Tensor:
        """Softmax over the members that adapt this layer, and the choice of those used."""
        logits = logits / self.settings.temperature
        if self._any_hidden[layer]:
            logits = logits.masked_fill(self._hidden[layer], float("-inf"))
        weights, probabilities = choose(logits, self.settings, straight_through=self.training)
        if self.observer is not None:
            self.observer(layer, probabilities, weights)
        return weights


def _unused(layer: AdaptedLayer, experts_per_layer: Sequence[int]) -> Tensor:
    """Members that are not used in a layer, (n_members,) bool: those without an update, and beyond MoLA's number."""
    norms = layer.norms()
    absent = torch.tensor([pair is None for pair in layer.updates])
    if experts_per_layer:
        n = experts_per_layer[min(int(layer.depth * len(experts_per_layer)), len(experts_per_layer) - 1)]
        kept = norms.masked_fill(absent, -1).argsort(descending=True, stable=True)[:n]
        absent |= ~torch.isin(torch.arange(len(norms)), kept)
    return absent
