"""Which adapters a token uses, given the logits of a gate: the best k, or as many as an entropy rule takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.settings import EntropyRule, MixSettings


def choose(logits: Tensor, settings: MixSettings, *, straight_through: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of the members, which sum to 1, and their probabilities before the choice: (..., n_members) each.

    Args:
        logits: (..., n_members); -inf excludes a member.
        straight_through: a single chosen member has the constant weight 1; give it the gradient of its probability.
    """
    probabilities = logits.softmax(dim=-1)
    if settings.entropy is not None:
        kept = by_entropy(probabilities, settings.entropy)
    elif settings.top_k is None or settings.top_k >= logits.shape[-1]:
        return probabilities, probabilities
    else:
        best = probabilities.topk(settings.top_k, dim=-1)
        if settings.top_k == 1:
            ones = torch.ones_like(best.values)
            one = ones + (best.values - best.values.detach()) if straight_through else ones
            return torch.zeros_like(probabilities).scatter(-1, best.indices, one), probabilities
        shares = best.values / best.values.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, best.indices, shares), probabilities
    weights = probabilities * kept
    return weights / weights.sum(dim=-1, keepdim=True), probabilities


def tsallis_entropy(probabilities: Tensor, q: float) -> Tensor:
    """H_q = (1 - sum p^q) / (q - 1), (...,); q = 1 is the limit, Shannon's entropy in nats."""
    if math.isclose(q, 1.0):
        shannon: Tensor = torch.special.entr(probabilities).sum(dim=-1)
        return shannon
    return (1 - probabilities.pow(q).sum(dim=-1)) / (q - 1)


def by_entropy(probabilities: Tensor, rule: EntropyRule) -> Tensor:
    """Which members a token uses, (..., n_members) bool: all where the gate is undecided, else the fewest whose
    probabilities pass `rule.p`."""
    ordered = probabilities.sort(dim=-1, descending=True)
    before = ordered.values.cumsum(dim=-1) - ordered.values
    fewest = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ordered.indices, before <= rule.p)
    undecided = tsallis_entropy(probabilities, rule.q) > rule.tau
    return (fewest | undecided[..., None]) & (probabilities > 0)
