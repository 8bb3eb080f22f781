"""RouterDC's two losses (arXiv 2409.19886), in torch; only training imports this."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

EXPERTS_COMPARED = 3
"""Number of highest-scoring experts (positives) and of lowest-scoring ones (negatives) of a query."""
NEGATIVES = 3
"""Queries of other clusters that are negatives of a query."""
GOOD = 0.5
"""An expert that scores more is never a negative."""
TIE_NOISE = 1e-6


def sample_llm_loss(logits: Tensor, scores: Tensor, chance: torch.Generator) -> Tensor:
    """Mean over b queries of -sum over the top three experts of log softmax(that expert against the lowest three).

    A top expert that scores 0 adds nothing; one of the lowest that scores more than 0.5 is left out. As in the authors'
    code, except that equal scores are ordered at random and no expert is its own negative.

    Args:
        logits: (b, m) cosines divided by the temperature; scores: (b, m) in [0, 1].
    """
    k = min(EXPERTS_COMPARED, logits.shape[1])
    order = (scores + TIE_NOISE * torch.rand(scores.shape, generator=chance)).argsort(dim=1, descending=True)
    top, last = order[:, :k], order[:, -k:]
    too_good = scores.gather(1, last) > GOOD
    loss = logits.new_zeros(())
    for i in range(k):
        positive = top[:, i : i + 1]
        negatives = logits.gather(1, last).masked_fill(too_good | (last == positive), -torch.inf)
        drawn = torch.cat([logits.gather(1, positive), negatives], dim=1).log_softmax(dim=1)[:, 0]
        loss = loss - (drawn * (scores.gather(1, positive)[:, 0] > 0)).mean()
    return loss


def sample_sample_loss(vectors: Tensor, clusters: Tensor, temperature: float, chance: torch.Generator) -> Tensor:
    """Mean over queries of -log softmax(one query of its cluster against three of others), by cosine / temperature.

    Pairs are sampled from the batch. A query is left out where its cluster or the rest of the batch has no other query.

    Args:
        vectors: (b, d); clusters: (b,).
    """
    same = clusters[:, None] == clusters[None, :]
    other = same & ~torch.eye(len(clusters), dtype=torch.bool)
    counted = other.any(dim=1) & ~same.all(dim=1)
    if not counted.any():
        return vectors.new_zeros(())
    draw = torch.rand(same.shape, generator=chance)
    positive = draw.masked_fill(~other, -1.0).argmax(dim=1, keepdim=True)
    ranked = draw.masked_fill(same, -1.0).topk(min(NEGATIVES, len(clusters)), dim=1)
    unit = normalize(vectors, dim=1)
    similarity = unit @ unit.T / temperature
    negatives = similarity.gather(1, ranked.indices).masked_fill(ranked.values < 0, -torch.inf)
    drawn = torch.cat([similarity.gather(1, positive), negatives], dim=1).log_softmax(dim=1)[:, 0]
    return -drawn[counted].mean()
