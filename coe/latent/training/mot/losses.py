"""The losses of a Mixture of Thoughts (arXiv 2509.21164) and of its router.

    L = L_ce + l_e (-H(mean_batch p)) + l_b M sum_m f_m pbar_m + l_c KL_sym(logits, logits') + l_r mean sum_m p_m r_m

p: probabilities of the router; f_m: share of the rows whose primary is m, without gradient; pbar_m: mean probability.
The first terms are those of the paper (l_e = l_b = 0.01), with H of the batch's mean, which asks for different members
in different rows and not for doubt in each. logits': of a second draw of peers for the same primary. The last term is
ours: r_m is the loss of the row with primary m minus that of the best one, measured once for all M members. Without it
no gradient tells the router who should answer, because the choice of the primary is hard.

Everything here is a pure function of tensors. B rows, M members, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, one_hot


def negative_entropy(p: Tensor) -> Tensor:
    """-H of the mean of p (B, M) over the batch: -log M if all members are equally likely, 0 if one always wins."""
    mean = p.mean(0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def balance(p: Tensor, primary: Tensor) -> Tensor:
    """M sum_m f_m pbar_m: 1 if the rows are spread evenly, M if one member is the primary of all with certainty.

    Args:
        p: (B, M). primary: (B,) positions.
    """
    n_members = p.shape[1]
    shares = one_hot(primary, n_members).to(p.dtype).mean(0)
    return n_members * (shares * p.mean(0)).sum()


def expected_regret(p: Tensor, regret: Tensor) -> Tensor:
    """Mean over the batch of sum_m p_m r_m; p and r (B, M), r >= 0."""
    return (p * regret).sum(1).mean()


def consistency(logits: Tensor, others: Tensor, temperature: float) -> Tensor:
    """T^2 (KL(a || b) + KL(b || a)) / 2, mean over N tokens, of two predictions (N, V) at a temperature T.

    The factor T^2 keeps the size of the gradient, as in distillation.
    """
    a, b = (each / temperature for each in (logits.float(), others.float()))
    both = _divergence(a, b) + _divergence(b, a)
    return temperature**2 * both / 2


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits), mean over N tokens; both (N, V)."""
    return _divergence(reference.float(), logits.float())


def row_losses(logits: Tensor, targets: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """(n_rows,) negative log-likelihood of each row's answer, in nats.

    Args:
        logits: (N, V). targets: (N,) right tokens. rows: (N,) the row of each token.
    """
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return losses.new_zeros(n_rows).index_add(0, rows, losses)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of logits (N, V), mean over N."""
    return kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
