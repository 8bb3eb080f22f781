"""RowSampler: temperature, top-p and seed per row."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from coe.engines.hf import sampling as hf_sampling  # noqa: E402
from coe.engines.hf.sampling import RowSampler, Sampling, pick, processors  # noqa: E402
from coe.sampling import SamplingOptions  # noqa: E402


def sampling(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Sampling:
    row = Sampling.of(temperature, top_p, seed)
    assert row is not None
    return row


def draw(logits: list[float], n: int, **how: float) -> Counter[int]:
    row = sampling(**how)  # type: ignore[arg-type]
    return Counter(int(pick(torch.tensor([logits]), [row])) for _ in range(n))


def test_frequencies_follow_the_softmax() -> None:
    counts = draw([0.0, 1.0, 2.0], 4000)
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    assert [counts[i] / 4000 for i in range(3)] == pytest.approx(expected.tolist(), abs=0.025)


def test_temperature_sharpens_and_a_tiny_one_is_greedy() -> None:
    assert draw([0.0, 1.0], 2000, temperature=0.5)[1] / 2000 == pytest.approx(0.881, abs=0.025)
    assert draw([5.0, 5.1, -3.0], 50, temperature=1e-30) == {1: 50}


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(draw(logits, 500, top_p=0.4)) == {0}
    assert set(draw(logits, 500, top_p=0.7)) == {0, 1}
    inside = draw(logits, 4000, top_p=0.79)
    assert inside[0] / 4000 == pytest.approx(0.625, abs=0.025)
    assert set(draw(logits, 2000, top_p=0.9)) == {0, 1, 2}
    assert set(draw(logits, 2000)) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_looking_at_the_best_first_changes_nothing(
    temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 1000, generator=generator) * 3

    def tokens(candidates: int) -> list[list[int]]:
        monkeypatch.setattr(hf_sampling, "_CANDIDATES", candidates)
        rows = [sampling(temperature, top_p, seed) for seed in range(6)]
        return [pick(logits, rows).tolist() for _ in range(20)]

    assert tokens(8) == tokens(64) == tokens(1000)


def test_a_row_draws_the_same_whatever_its_company() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    alone = [int(pick(logits[1:2], [row])) for row in [sampling(seed=7)] for _ in range(10)]
    rows = [sampling(seed=1), sampling(seed=7), sampling(1.5, 0.8, seed=9)]
    together = [int(pick(logits, rows)[1]) for _ in range(10)]
    assert alone == together
    assert len(set(alone)) > 1


def test_greedy_rows_are_untouched_and_sampled_ones_forced() -> None:
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    before = scores.clone()
    after = RowSampler([None, sampling(seed=5), None])(torch.zeros(3, 1), scores)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].isfinite().sum() == 1
    assert int(after[1].argmax()) == int(pick(before[1:2], [sampling(seed=5)]))
    greedy = RowSampler([None, None])
    assert greedy(torch.zeros(2, 1), scores) is scores


def test_zero_temperature_is_greedy_and_no_seed_draws_one() -> None:
    assert Sampling.of(0.0, 0.5, 1) is None
    first, second = Sampling.of(1.0, 1.0, None), Sampling.of(1.0, 1.0, None)
    assert first is not None
    assert second is not None
    assert first.rng.random() != second.rng.random()


# The cut-offs and processors of transformers


CUT_OFFS = [
    {"top_k": 3},
    {"top_k": 700, "top_p": 0.95},
    {"top_k": 40, "top_p": 0.6},
    {"min_p": 0.05},
    {"min_p": 0.3, "top_p": 0.8},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 2**31 - 1},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("cuts", CUT_OFFS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.8])
def test_cut_offs_leave_the_tokens_that_those_of_transformers_leave(cuts: dict[str, Any], temperature: float) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(5)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if "top_k" in cuts:
        scores = TopKLogitsWarper(cuts["top_k"])(None, scores)
    if "top_p" in cuts:
        scores = TopPLogitsWarper(cuts["top_p"])(None, scores)
    if "min_p" in cuts:
        scores = MinPLogitsWarper(cuts["min_p"])(None, scores)
    best = scores.softmax(-1)[0].sort(descending=True)
    cumulative = best.values.double().cumsum(0)

    row = Sampling(temperature, cuts.get("top_p", 1.0), random.Random(1), cuts.get("top_k", 0), cuts.get("min_p", 0.0))
    draws = random.Random(1)
    for _ in range(300):
        token, draw = int(pick(logits, [row])), draws.random()
        expected = int(best.indices[int((cumulative <= draw).sum())])
        if token != expected:  # only where the draw lies on the border of two tokens
            assert float((cumulative - draw).abs().min()) < 1e-5
        assert scores[0, token].isfinite()


def test_rows_with_cut_offs_leave_the_others_as_they_are() -> None:
    logits = torch.randn(3, 900, generator=torch.Generator().manual_seed(2))
    alone = [int(pick(logits[1:2], [row])) for row in [sampling(seed=7)] for _ in range(20)]
    rows = [Sampling(1.0, 0.9, random.Random(1), 4, 0.1), sampling(seed=7), Sampling(0.7, 1.0, random.Random(3), 800)]
    assert [int(pick(logits, rows)[1]) for _ in range(20)] == alone


def test_processors_are_those_of_transformers() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, bos_token_id=1
    )
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config)
    settings: dict[str, Any] = {"repetition_penalty": 1.7, "min_new_tokens": 4, "eos_token_id": [7, 9]}
    bias = {11: 2.5, 7: 8.0, 40: -100.0}
    options = SamplingOptions(repetition_penalty=1.7, min_tokens=4, logit_bias=bias)
    generation = type(model.generation_config)(**settings, sequence_bias=[[[i], b] for i, b in bias.items()])
    prompt = torch.tensor([[3, 11, 5]])
    model._prepare_special_tokens(generation)
    theirs = model._get_logits_processor(generation, input_ids_seq_length=3, device="cpu")
    ours = processors(options, 3, {7, 9})
    for n in range(8):
        ids = torch.cat([prompt, torch.tensor([[20, 21, 20, 22, 40, 3, 50, 20]])[:, :n]], dim=1)
        scores = torch.randn(1, 60, generator=torch.Generator().manual_seed(n))
        assert torch.equal(ours(ids, scores.clone()), theirs(ids, scores.clone()))
        assert bool(ours(ids, scores)[0, [7, 9]].isinf().all()) == (n < 4)


def test_penalties_of_occurrence_count_the_answer_only() -> None:
    change = processors(SamplingOptions(frequency_penalty=0.5, presence_penalty=0.25), 2, {0})
    scores = torch.zeros(1, 6)
    assert change(torch.tensor([[4, 4]]), scores).tolist() == [[0.0] * 6]
    assert change(torch.tensor([[4, 4, 1, 2, 1]]), scores).tolist() == [[0.0, -1.25, -0.75, 0.0, 0.0, 0.0]]
    assert scores.tolist() == [[0.0] * 6]


def test_options_without_effect_have_no_processor() -> None:
    assert processors(SamplingOptions(), 3, {0}) is None
    assert processors(SamplingOptions(top_k=5, min_p=0.2, ignore_eos=True), 3, ()) is None


def test_an_extreme_penalty_still_gives_a_token() -> None:
    change = processors(SamplingOptions(repetition_penalty=1e-300), 2, {0})
    scores = change(torch.tensor([[1, 2]]), torch.tensor([[0.5, 1.0, -1.0, 0.2]]))
    assert 0 <= int(pick(scores, [sampling()])) < 4
