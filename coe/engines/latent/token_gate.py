"""The token gate: which of several experts of one tokenizer the next token is taken from, from their own certainty.

    scores = sum_m softmax(g)_m log p_m,   g_m = W2 relu(W1 x_m + b1) + b2        6 -> 32 -> 1: 257 weights for any M

    x_m = entropy of p_m, its largest probability, the margin to its second one, its mean log-probability of the other
          experts' most likely tokens, the share of experts with the same most likely token, the stated quality of m

The features are those of DLLG (arXiv 2606.04378); the weights are shared by all experts, so that a gate serves others
than it was trained with. Logarithms are bounded below, which is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import torch
from torch import Tensor, nn

from coe.errors import WeightsError

FEATURES: Final = 6
HIDDEN: Final = 32
_LEAST_LOGPROB: Final = -12.0
_NAMES: Final = ("0.weight", "0.bias", "2.weight", "2.bias")


class TokenGate(nn.Module):
    """Weights of experts for each token.

    Args:
        seed: of the first weights; the last layer is zero, so that all experts have the same weight.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(HIDDEN, 1)
            self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """log softmax(g): (..., M) logarithms of the weights from features (..., M, 6)."""
        scores: Tensor = self.layers(features).squeeze(-1)
        return scores.log_softmax(dim=-1)

    def scores(self, logprobs: Tensor, quality: Tensor) -> Tensor:
        """sum_m softmax(g)_m log p_m, (V,) from log-probabilities (M, V) and qualities (M,)."""
        weights: Tensor = self(token_features(logprobs, quality)).exp()
        return weights @ logprobs

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The gate of an artifact. Raises WeightsError: tensors are missing, of other shapes, or not finite."""
        gate = cls()
        own = gate.layers.state_dict()
        if tensors.keys() != own.keys() or any(tensors[name].shape != own[name].shape for name in own):
            wanted = ", ".join(f"{name} {tuple(own[name].shape)}" for name in _NAMES)
            raise WeightsError(f"the artifact of a token gate has the tensors {wanted}, not {sorted(tensors)[:8]}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise WeightsError("the token gate has weights that are not finite: train it again")
        gate.layers.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return gate.requires_grad_(False).eval()

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their names in an artifact."""
        return {name: tensor.detach() for name, tensor in self.layers.state_dict().items()}


def token_features(logprobs: Tensor, quality: Tensor) -> Tensor:
    """Features (..., M, 6) of M >= 2 experts from their log-probabilities (..., M, V) of the next token.

    Args:
        quality: (M,) stated quality of each expert, in [0, 1].
    """
    n_experts = logprobs.shape[-2]
    entropy = -(logprobs.exp() * logprobs.clamp_min(-100.0)).sum(dim=-1)
    best, tokens = logprobs.topk(2, dim=-1)
    first, second = best[..., 0].exp(), best[..., 1].exp()
    top = tokens[..., 0]  # (..., M)
    # (..., M, M): log p_m of the most likely token of each expert
    crossed = logprobs.gather(-1, top[..., None, :].expand(*top.shape, n_experts)).clamp_min(_LEAST_LOGPROB)
    others = ~torch.eye(n_experts, dtype=torch.bool, device=logprobs.device)
    of_others = (crossed * others).sum(dim=-1) / max(1, n_experts - 1)
    agreeing = (top[..., :, None] == top[..., None, :]).float().mean(dim=-1)
    stated = quality.to(logprobs).expand(top.shape)
    return torch.stack([entropy, first, first - second, of_others, agreeing, stated], dim=-1)
