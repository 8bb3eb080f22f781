"""The losses of a mixture of thoughts: values that can be computed by hand, signs, and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from coe.latent.training.mot.losses import (
    balance,
    consistency,
    divergence,
    expected_regret,
    negative_entropy,
    row_losses,
)

SURE = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
EVEN = torch.full((1, 4), 0.25)


def test_the_entropy_is_that_of_the_batch_and_not_of_each_row() -> None:
    different = torch.eye(4)  # every row is sure, and the batch uses all members
    assert negative_entropy(different).item() == pytest.approx(-math.log(4))
    assert negative_entropy(EVEN.expand(4, -1)).item() == pytest.approx(-math.log(4))
    assert negative_entropy(SURE.expand(4, -1)).item() == pytest.approx(0.0, abs=1e-6)


def test_the_balance_is_lowest_where_rows_are_spread_evenly() -> None:
    rows = torch.arange(4)
    assert balance(torch.eye(4), rows).item() == pytest.approx(1.0)
    assert balance(SURE.expand(4, -1), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(4.0)
    assert balance(EVEN.expand(4, -1), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("term", ["entropy", "balance"])
def test_both_terms_move_probability_away_from_the_member_that_gets_all_rows(term: str) -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0, 0.0]]).expand(8, -1).clone().requires_grad_()
    p = scores.softmax(1)
    loss = negative_entropy(p) if term == "entropy" else balance(p, torch.zeros(8, dtype=torch.long))
    loss.backward()
    assert scores.grad is not None
    assert bool((scores.grad[:, 0] > 0).all())  # a step down lowers the score of the first member
    assert bool((scores.grad[:, 1:] < 0).all())


def test_the_regret_is_weighted_by_the_probabilities() -> None:
    regret = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    loss = expected_regret(p, regret)
    assert loss.item() == pytest.approx((0.25 * 2 + 0.5 * 1) / 2)
    loss.backward()
    assert p.grad is not None
    assert p.grad.tolist() == [[0.0, 1.0], [0.5, 0.0]]


def test_the_consistency_is_the_symmetric_divergence_at_a_temperature() -> None:
    a, b = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    p, q = (a / 2).softmax(-1), (b / 2).softmax(-1)
    wanted = 4 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    assert consistency(a, b, 2.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert consistency(b, a, 2.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert consistency(a, a, 2.0).item() == 0.0
    assert divergence(a, b).item() > 0


def test_the_loss_of_a_row_is_the_sum_over_its_tokens() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets, rows = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 2, 2, 2])
    losses = row_losses(logits, targets, rows, 3)
    each = -logits.log_softmax(-1)[torch.arange(5), targets]
    assert losses.tolist() == pytest.approx([each[:2].sum().item(), 0.0, each[2:].sum().item()])
