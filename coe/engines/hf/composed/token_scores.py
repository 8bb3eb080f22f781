"""One distribution of the next token from those of several experts of one tokenizer. M experts, V tokens.

All take logits (M, V) in float32 and return scores (V,), whose softmax is the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mean(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_m w_m log p_m / sum_m w_m: the geometric mean of the distributions.

    Args:
        weights: (M,), at least one above 0.
    """
    shares = logits.new_tensor(weights) / sum(weights)
    used = shares > 0  # a token that an unused expert excludes stays possible
    return shares[used] @ logits[used].log_softmax(dim=-1)


def contrast(logits: Tensor, beta: float, plausibility: float) -> Tensor:
    """(1 + beta) log p_expert - beta log p_amateur, of the tokens that are plausible to the expert.

    Contrastive decoding (arXiv 2210.15097, equations 2 and 3): p_expert(x) >= plausibility * max p_expert; all other
    tokens are excluded. That paper subtracts in full; the factor is that of arXiv 2309.09117, with which beta 0 is the
    expert.

    Args:
        logits: (2, V) of the expert and the amateur.
        plausibility: alpha of the paper, in [0, 1].
    """
    import torch

    if beta == 0:
        return logits[0]
    expert, amateur = logits.log_softmax(dim=-1)
    is_plausible = expert >= expert.amax() + torch.tensor(plausibility).log().to(expert)
    return torch.where(is_plausible, (1 + beta) * expert - beta * amateur, -torch.inf)


def proxy(logits: Tensor, alpha: float) -> Tensor:
    """logits_A + alpha (logits_B - logits_base): what training has changed in B, applied to A.

    Emulated fine-tuning (arXiv 2310.12962) and proxy tuning (arXiv 2401.08565). Alpha 0 is A.

    Args:
        logits: (3, V) of A, B and the base of B.
    """
    import torch

    if alpha == 0:
        return logits[0]
    answer, tuned, base = logits
    scores = answer + alpha * (tuned - base)
    return torch.where(logits.isfinite().all(dim=0), scores, -torch.inf)  # not a token of one of them


@dataclass(slots=True)
class OnlyWhereItPays:
    """Combines only where the experts differ and none is certain (after SAFE, arXiv 2510.15346).

    If all have the same most likely token, or one gives its own more than `certain`, the scores of the expert that is
    most certain are taken as they are.

    Attributes:
        combine: of the other tokens.
        n_tokens, n_combined: tokens so far, and those of them that were combined.
    """

    combine: Callable[[Tensor], Tensor]
    certain: float
    n_tokens: int = 0
    n_combined: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores (V,) from logits (M, V)."""
        best, tokens = logits.softmax(dim=-1).max(dim=-1)
        self.n_tokens += 1
        if bool((tokens == tokens[0]).all()) or bool(best.amax() > self.certain):
            return logits[int(best.argmax())]
        self.n_combined += 1
        return self.combine(logits)
