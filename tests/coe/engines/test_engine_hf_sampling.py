"""RowSampler: temperature, top-p and seed per row."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from coe.engines.hf import sampling as hf_sampling  # noqa: E402
from coe.engines.hf.sampling import RowSampler, Sampling, pick  # noqa: E402


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
