"""Gates: the weights that they give to adapters, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coe.engines.hf.lora.gates import GATES, build_gate, new_gate
from coe.engines.hf.lora.gates.arrow import first_right_singular_vector
from coe.engines.hf.lora.gates.choice import by_entropy, choose, tsallis_entropy
from coe.engines.hf.lora.gates.gate import AdaptedLayer, Gate
from coe.engines.hf.lora.gates.settings import EntropyRule, MixSettings
from coe.errors import ConfigError, WeightsError

MEMBERS = ("sql", "dates", "units")
N_IN = 12


def settings(**values: Any) -> MixSettings:
    return MixSettings.read(values, MEMBERS, expert="mix")


def layers(n: int = 2, *, ranks: tuple[int, ...] = (4, 4, 2), scale: float = 1.0) -> list[AdaptedLayer]:
    random = torch.Generator().manual_seed(3)

    def update(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, N_IN, generator=random), scale * torch.randn(10, rank, generator=random)

    return [AdaptedLayer(f"layers.{i}.q_proj", i / n, tuple(update(rank) for rank in ranks)) for i in range(n)]


def inputs(n_rows: int = 2, n_tokens: int = 5) -> torch.Tensor:
    return torch.randn(n_rows, n_tokens, N_IN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_svd_is_the_dense_one_up_to_the_sign(rank: int) -> None:
    random = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 40, generator=random), torch.randn(24, rank, generator=random)
    dense = torch.linalg.svd(b @ a).Vh[0]
    found = first_right_singular_vector(a, b)
    assert found.norm() == pytest.approx(1, abs=1e-5)
    assert abs(float(found @ dense)) == pytest.approx(1, abs=1e-4)


def test_an_update_of_zero_has_no_direction() -> None:
    assert first_right_singular_vector(torch.randn(3, 8), torch.zeros(5, 3)).tolist() == [0.0] * 8


def test_arrow_does_not_depend_on_the_signs_of_the_updates() -> None:
    flipped = [
        AdaptedLayer(layer.name, layer.depth, tuple((pair[0], -pair[1]) for pair in layer.updates if pair))
        for layer in layers()
    ]
    gate, other = (new_gate(each, MEMBERS, settings(gate="arrow", top_k=2)) for each in (layers(), flipped))
    torch.testing.assert_close(gate(1, inputs()), other(1, inputs()))
    gate.prototypes1.neg_()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(gate(1, inputs()), other(1, inputs()))


def test_arrow_prefers_the_adapter_whose_update_responds_most() -> None:
    [layer] = layers(1)
    gate = new_gate([layer], MEMBERS, settings(gate="arrow", top_k=1))
    for member, pair in enumerate(layer.updates):
        assert pair is not None
        weights = gate(0, 50 * first_right_singular_vector(*pair).expand(1, 1, -1))
        assert weights[0, 0].argmax() == member


def with_random_weights(gate: Gate) -> Gate:
    tensors = {name: torch.randn_like(tensor) for name, tensor in gate.weights().items()}
    if "instructions" in tensors:
        tensors["instructions"] = torch.randn(len(MEMBERS), 7)
    gate.load(tensors, expert="mix")
    return gate.eval()


def test_phatgoose_mixes_two_adapters_whose_weights_sum_to_1() -> None:
    gate = with_random_weights(new_gate(layers(), MEMBERS, settings(gate="phatgoose")))
    weights = gate(0, inputs())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 5))
    assert (weights > 0).sum(dim=-1).unique().tolist() == [2]


def test_phatgoose_standardises_input_and_gate_vector() -> None:
    gate = with_random_weights(new_gate(layers(), MEMBERS, settings(gate="phatgoose", top_k=None)))

    def standardised(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True, unbiased=False)

    v = gate.weights()["v.layers.1.q_proj"]
    expected = (standardised(inputs()) @ standardised(v).mT / N_IN**0.5).softmax(dim=-1)
    torch.testing.assert_close(gate(1, inputs()), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gate(1, 3 * inputs() + 1), expected, rtol=1e-3, atol=1e-4)


def test_phatgoose_trains_the_gate_of_the_members_of_the_rows_alone() -> None:
    gate = new_gate(layers(), MEMBERS, settings(gate="phatgoose")).train()
    weights = gate(0, inputs(), torch.eye(3)[[1, 2]])
    assert weights[0].unique().tolist() == [0, 0.5]  # sigmoid(0): before training
    assert weights[0, :, 1].tolist() == weights[1, :, 2].tolist() == [0.5] * 5
    weights.sum().backward()
    gradient = dict(gate.named_parameters())["v.0"].grad
    assert gradient is not None
    assert gradient.abs().sum(dim=-1).gt(0).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="no members"):
        gate(0, inputs())


def test_glider_with_scale_0_is_phatgoose() -> None:
    glider = with_random_weights(new_gate(layers(), MEMBERS, settings(gate="glider", scale=0.0)))
    phatgoose = new_gate(layers(), MEMBERS, settings(gate="phatgoose")).eval()
    phatgoose.load({n: t for n, t in glider.weights().items() if n != "instructions"}, expert="mix")
    query = glider.query_logits(torch.randn(2, 7))
    assert query is None
    assert glider(1, inputs(), query).equal(phatgoose(1, inputs()))


def test_glider_adds_the_cosine_of_instruction_and_query() -> None:
    gate = with_random_weights(new_gate(layers(), MEMBERS, settings(gate="glider", scale=1000.0, top_k=1)))
    queries = gate.weights()["instructions"][[2, 0]] * 9
    query = gate.query_logits(queries)
    assert query is not None
    assert query.amax(dim=-1).tolist() == pytest.approx([1000, 1000], rel=1e-5)
    assert gate(0, inputs(), query).argmax(dim=-1).tolist() == [[2] * 5, [0] * 5]


def test_fixed_weights_are_the_same_for_all_tokens() -> None:
    gate = new_gate(layers(), MEMBERS, settings(gate="fixed", weights={"dates": 0.5, "sql": -1}))
    assert gate(0, inputs()).reshape(-1, 3).unique(dim=0).tolist() == [[-1.0, 0.5, 0.0]]


def test_entropy_of_tsallis() -> None:
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    assert tsallis_entropy(p, 1.1)[:2].tolist() == pytest.approx([(1 - 4**-0.1) / 0.1, 0], abs=1e-5)
    assert tsallis_entropy(p, 2.0)[2] == pytest.approx(1 - 0.52)
    torch.testing.assert_close(tsallis_entropy(p, 1.0), tsallis_entropy(p, 1.0001), rtol=1e-3, atol=1e-3)


def test_the_entropy_rule_adds_adapters_until_their_sum_passes_p() -> None:
    p = torch.tensor([[0.05, 0.6, 0.35], [0.9, 0.05, 0.05], [0.34, 0.33, 0.33]])
    assert by_entropy(p, EntropyRule(tau=10, p=0.75)).tolist() == [
        [False, True, True],
        [True, False, False],
        [True, True, True],
    ]
    assert by_entropy(p, EntropyRule(tau=0.5, p=0.5)).tolist() == [
        [True, True, True],  # undecided: all softly
        [True, False, False],
        [True, True, True],
    ]
    weights, _ = choose(p.log(), settings(gate="trained", entropy={"tau": 10}))
    assert weights[0].tolist() == pytest.approx([0, 0.6 / 0.95, 0.35 / 0.95], abs=1e-5)


@pytest.mark.parametrize(("top_k", "n_used"), [(1, 1), (2, 2), (3, 3), (None, 3)])
def test_top_k(top_k: int | None, n_used: int) -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0]])
    weights, probabilities = choose(logits, settings(top_k=top_k))
    assert (weights > 0).sum() == n_used
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(probabilities, logits.softmax(dim=-1))


def test_one_chosen_adapter_has_weight_1_and_the_gradient_of_its_probability() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0]], requires_grad=True)
    weights, _ = choose(logits, settings(top_k=1), straight_through=True)
    assert weights.tolist() == [[0.0, 1.0, 0.0]]
    weights[0, 1].backward()  # type: ignore[no-untyped-call]
    gradient, logits.grad = logits.grad, None
    logits.softmax(dim=-1)[0, 1].backward()  # type: ignore[no-untyped-call]
    assert gradient is not None
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad)


def test_experts_per_layer_keeps_the_largest_updates_of_each_layer() -> None:
    four = layers(4)
    gate = new_gate(four, MEMBERS, settings(gate="trained", top_k=None, experts_per_layer=[1, 3]))
    for number, layer in enumerate(four):
        used = gate(number, inputs()).gt(0).flatten(0, 1).all(dim=0)
        dense = torch.stack([(b @ a).norm() for a, b in (pair for pair in layer.updates if pair)])
        torch.testing.assert_close(layer.norms(), dense, rtol=1e-4, atol=1e-4)
        assert used.tolist() == ([i == dense.argmax() for i in range(3)] if number < 2 else [True] * 3)


def test_members_that_do_not_adapt_a_layer_are_not_chosen_there() -> None:
    [layer] = layers(1)
    partial = AdaptedLayer(layer.name, 0.0, (layer.updates[0], None, layer.updates[2]))
    for name in ("arrow", "phatgoose", "glider", "trained"):
        gate = with_random_weights(new_gate([partial], MEMBERS, settings(gate=name)))
        assert gate(0, inputs())[..., 1].abs().max() == 0


@pytest.mark.parametrize("name", sorted(GATES))
def test_weights_are_saved_and_loaded(name: str) -> None:
    gate = with_random_weights(new_gate(layers(), MEMBERS, settings(gate=name)))
    again = build_gate(layers(), MEMBERS, settings(gate=name), gate.weights(), expert="mix")
    assert again(1, inputs()).equal(gate(1, inputs()))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"v.layers.0.q_proj": None}, "lacks v.layers.0.q_proj"),
        ({"v.layers.9.q_proj": torch.zeros(3, N_IN)}, "has v.layers.9.q_proj, which is not used"),
        ({"v.layers.0.q_proj": torch.zeros(4, N_IN)}, r"of shape \(4, 12\) instead of \(3, 12\)"),
        ({"v.layers.0.q_proj": torch.full((3, N_IN), torch.nan)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], problem: str) -> None:
    gate = new_gate(layers(), MEMBERS, settings(gate="phatgoose"))
    tensors = {name: tensor for name, tensor in (gate.weights() | change).items() if tensor is not None}
    with pytest.raises(WeightsError, match=problem):
        gate.load(tensors, expert="mix")


def test_a_gate_that_is_trained_needs_an_artifact() -> None:
    with pytest.raises(WeightsError, match="train it with `coe latent train`"):
        build_gate(layers(), MEMBERS, settings(gate="trained"), None, expert="mix")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"gate": "gating"}, "gate: Input should be"),
        ({"topk": 2}, "topk: Extra inputs"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 4}, "top_k is 4, and it has 3 members"),
        ({"gate": "fixed", "weights": {"math": 1}}, "'math', which are not among its members: sql, dates, units"),
        ({"gate": "fixed", "weights": {"sql": float("nan")}}, "weights.sql"),
        ({"gate": "arrow", "weights": {"sql": 1}}, "`weights` are for the gate 'fixed'"),
        ({"gate": "arrow", "instructions": {"sql": "write SQL"}}, "are for the gate 'glider'"),
        ({"gate": "arrow", "noise": 1}, "are for the gate 'trained'"),
        ({"temperature": 0}, "temperature"),
        ({"gate": "trained", "balance": {"kind": "localized"}}, "balance.groups"),
        ({"gate": "trained", "experts_per_layer": [0]}, "experts_per_layer"),
        ({"entropy": {"q": 0}}, "entropy.q"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(**values)
