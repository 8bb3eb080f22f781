"""The router of Mixture of Thoughts: choices, Gumbel top-K, straight-through gradients, its tensors, refusals."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from coe.engines.latent.mot_router import (
    Chosen,
    MotRouter,
    encoder_facts,
    gumbel,
    read_chooser,
    temperature,
)
from coe.errors import ConfigError, WeightsError
from routers.encoders.build import HashingEncoder

MEMBERS = ("a", "b", "c", "d")
DIM = 16


@pytest.fixture
def router() -> MotRouter:
    torch.manual_seed(0)
    return MotRouter(len(MEMBERS), 3, DIM)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(reader: HashingEncoder, **other: object) -> dict[str, object]:
    return {"router": "latent", "k": 3, "encoder": encoder_facts(reader)} | other


def test_without_noise_the_largest_scores_are_chosen_in_their_order(router: MotRouter) -> None:
    draw = router.draw(torch.tensor([[0.1, 3.0, -1.0, 2.0], [5.0, 1.0, 2.0, 3.0]]))
    assert draw.order.tolist() == [[1, 3, 0], [0, 3, 2]]
    assert draw.primary.tolist() == [1, 0]
    assert draw.weights.tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]


def test_equal_scores_choose_the_first_members(router: MotRouter) -> None:
    assert router.draw(torch.zeros(2, 4)).order.tolist() == [[0, 1, 2]] * 2


def test_gumbel_draws_have_the_frequencies_of_a_softmax_without_replacement(router: MotRouter) -> None:
    # Plackett-Luce: with tau 1, an order has the probability of drawing its members one after the other.
    scores = torch.tensor([1.0, 0.0, -0.5, 0.5])
    n = 40_000
    order = router.draw(scores.expand(n, -1), gumbel((n, 4), seeded())).order
    p = scores.exp()
    for wanted in permutations(range(4), 3):
        left, probability = p.sum().item(), 1.0
        for member in wanted:
            probability *= p[member].item() / left
            left -= p[member].item()
        share = (order == torch.tensor(wanted)).all(1).float().mean().item()
        assert share == pytest.approx(probability, abs=5 * math.sqrt(probability / n))


def test_less_noise_chooses_by_the_scores(router: MotRouter) -> None:
    scores = torch.tensor([[1.0, 0.0, -0.5, 0.5]]).expand(4000, -1)
    noise = gumbel((4000, 4), seeded())
    shares = [(router.draw(scores, noise, tau).primary == 0).float().mean().item() for tau in (1.0, 0.3, 0.0)]
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_the_noise_is_gumbel() -> None:
    noise = gumbel((100_000,), seeded())
    assert bool(noise.isfinite().all())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_the_temperature_falls_from_one_to_a_tenth() -> None:
    taus = [temperature(step, 50) for step in range(50)]
    assert taus[0] == 1.0 and taus[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(taus))
    assert temperature(0, 1) == 1.0


def test_a_second_draw_keeps_the_primary_and_draws_other_peers(router: MotRouter) -> None:
    scores = torch.zeros(500, 4)
    first = router.draw(scores, gumbel((500, 4), seeded(1)))
    second = router.draw(scores, gumbel((500, 4), seeded(2)), primary=first.primary)
    assert second.primary.tolist() == first.primary.tolist()
    same = (first.weights == second.weights).all(1).float().mean().item()
    assert same == pytest.approx(1 / 3, abs=0.1)  # two of the three others, at random
    assert all(len(set(order)) == 3 for order in second.order.tolist())


def test_weights_are_exactly_one_or_zero_and_carry_the_gradient_of_the_probabilities(router: MotRouter) -> None:
    scores = router(torch.randn(5, DIM, generator=seeded()))
    draw = router.draw(scores)
    assert set(draw.weights.detach().flatten().tolist()) == {0.0, 1.0}
    assert draw.log_weights[draw.weights > 0.5].tolist() == [0.0] * 15
    assert bool(draw.log_weights.isfinite().all())
    p = scores.softmax(1)
    (through_weights,) = torch.autograd.grad(draw.weights[0, 1], scores, retain_graph=True)
    (through_p,) = torch.autograd.grad(p[0, 1], scores)
    assert torch.equal(through_weights, through_p)
    assert through_weights[0].abs().max().item() > 0


def test_the_first_layer_gets_a_gradient_through_a_log_weight(router: MotRouter) -> None:
    draw = router.draw(router(torch.randn(5, DIM, generator=seeded())))
    draw.log_weights[0, draw.order[0, 1]].backward()
    gradient = router.layers[0].weight.grad
    assert isinstance(gradient, torch.Tensor) and gradient.abs().sum().item() > 0


def test_a_prompt_is_read_with_the_encoder_and_an_embedding_is_taken_as_it_is(router: MotRouter) -> None:
    encoder = HashingEncoder(DIM)
    chooser = read_chooser(MEMBERS, settings(encoder), router.tensors(), encoder)
    prompts = ["three litres in millilitres", "a table for two", "first of May", "SELECT", "hello"]
    scores = router(torch.from_numpy(encoder.encode(prompts))).detach()
    for prompt, row in zip(prompts, scores, strict=True):
        order = row.argsort(descending=True).tolist()
        chosen = chooser.choose(prompt)
        assert chosen == chooser.choose("", embedding=encoder.encode([prompt])[0])
        assert chosen.primary == MEMBERS[order[0]]
        assert chosen.peers == tuple(MEMBERS[i] for i in order[1:3])
        assert chosen.weights == (1.0, 1.0)
        assert list(chosen.probabilities.values()) == pytest.approx(row.softmax(0).tolist())


def test_the_encoder_is_made_from_the_settings(router: MotRouter) -> None:
    encoder = HashingEncoder(DIM)
    made = read_chooser(MEMBERS, settings(encoder), router.tensors())
    given = read_chooser(MEMBERS, settings(encoder), router.tensors(), encoder)
    assert made.choose("seven metres") == given.choose("seven metres")


def test_first_is_the_first_members_for_every_prompt() -> None:
    chooser = read_chooser(MEMBERS, {"router": "first", "k": 2}, {})
    assert chooser.choose("x") == Chosen("a", ("b",), (1.0,), {"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0})
    assert read_chooser(MEMBERS, {}, {}).choose("x").peers == ("b", "c", "d")


@pytest.mark.parametrize("k", [5, 0, -1, True, 2.0, "3", None])
def test_an_impossible_k_is_refused(k: object) -> None:
    with pytest.raises(ConfigError, match="k, the number of active members, is"):
        read_chooser(MEMBERS, {"router": "first", "k": k}, {})


@pytest.mark.parametrize("members, fault", [(("a",), "2 to 64 members, not 1"), (("a", "b", "a"), "different experts")])
def test_impossible_members_are_refused(members: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        read_chooser(members, {"router": "first", "k": 1}, {})


def test_an_unknown_router_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="'best' is not known; there are: latent, first"):
        read_chooser(MEMBERS, {"router": "best"}, {})


def test_damaged_weights_are_refused(router: MotRouter) -> None:
    encoder, tensors = HashingEncoder(DIM), router.tensors()
    with pytest.raises(WeightsError, match=r"no matrix router.0.weight"):
        read_chooser(MEMBERS, settings(encoder), {}, encoder)
    with pytest.raises(WeightsError, match="needs tensors of the shapes"):
        read_chooser(MEMBERS, settings(encoder), tensors | {"router.2.bias": torch.zeros(5)}, encoder)
    with pytest.raises(WeightsError, match="needs tensors of the shapes"):
        read_chooser(MEMBERS[:3], settings(encoder), tensors, encoder)
    with pytest.raises(WeightsError, match="not finite"):
        read_chooser(MEMBERS, settings(encoder), tensors | {"router.2.bias": torch.full((4,), math.nan)}, encoder)


def test_another_encoder_is_refused(router: MotRouter) -> None:
    encoder = HashingEncoder(DIM)
    stated = settings(encoder, encoder={"name": encoder.name, "digest": "sha256:0"})
    with pytest.raises(WeightsError, match="trained with another encoder"):
        read_chooser(MEMBERS, stated, router.tensors(), encoder)
    with pytest.raises(WeightsError, match="is not here"):
        read_chooser(MEMBERS, settings(encoder, encoder={"name": "gone", "digest": "sha256:0"}), router.tensors())
    with pytest.raises(WeightsError, match="lack `encoder`"):
        read_chooser(MEMBERS, {"router": "latent"}, router.tensors(), encoder)


def test_an_embedding_of_another_length_is_refused(router: MotRouter) -> None:
    encoder = HashingEncoder(DIM)
    chooser = read_chooser(MEMBERS, settings(encoder), router.tensors(), encoder)
    with pytest.raises(WeightsError, match="embeddings of 16 numbers"):
        chooser.choose("x", embedding=np.zeros(3, np.float32))
