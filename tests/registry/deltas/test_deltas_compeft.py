"""ComPEFT: how many weights are kept, which, and how close what is restored is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from delta_files import adapter_folder, compressed, model_folder, restored_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from registry.deltas.lora_factors import ternary
from registry.deltas.manifest import CHUNK, PAYLOAD, read_delta
from registry.deltas.restoring import OpenDelta
from registry.deltas.selection import threshold


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=60), st.integers(0, 70))
def test_the_largest_are_kept_and_no_zeros(numbers: list[float], keep: int) -> None:
    values = np.array(numbers, np.float32)
    half = len(values) // 2
    found = threshold(lambda: [values[:half], values[half:]], keep)
    signs = np.concatenate([found.signs(values[:half]), found.signs(values[half:])])
    assert np.count_nonzero(signs) == min(keep, np.count_nonzero(values))
    assert all(np.sign(values[signs != 0]) == signs[signs != 0])
    if 0 < np.count_nonzero(signs) < np.count_nonzero(values):
        assert np.abs(values[signs != 0]).min() >= np.abs(values[signs == 0]).max()


def test_full_weights_are_the_base_and_the_largest_differences(tmp_path: Path) -> None:
    base = model_folder(
        tmp_path / "base", {"w": torch.zeros(2, 5), "v": torch.ones(4).bfloat16(), "n": torch.arange(3)}
    )
    w = torch.tensor([[0.5, -0.25, 0.01, 0, 0], [0, 0, 0.02, -0.03, 0]])
    v = torch.tensor([1, 1, 1, 3]).bfloat16()
    expert = model_folder(tmp_path / "expert", {"w": w, "v": v, "n": torch.arange(3) + 1})
    delta = compressed(expert, base, tmp_path / "delta", density=3 / 14)  # three of fourteen floats
    found = load_file(restored_in(delta, base, tmp_path / "again") / "model.safetensors")
    assert found["w"].tolist() == [[0.375, -0.375, 0, 0, 0], [0, 0, 0, 0, 0]]  # the mean of 0.5 and 0.25
    assert found["v"].tolist() == [1, 1, 1, 3]
    assert found["n"].tolist() == [1, 2, 3]  # not a float: exact
    stated = read_delta(delta)
    assert (stated.method, stated.density, stated.alpha) == ("compeft", 3 / 14, 1.0)
    assert OpenDelta.open(delta).how == {"n": ("xor", 0.0), "v": ("added", 2.0), "w": ("added", 0.375)}


def test_alpha_is_a_factor_of_the_scales(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", {"w": torch.zeros(4)})
    expert = model_folder(tmp_path / "expert", {"w": torch.tensor([1.0, -1.0, 0, 0])})
    delta = compressed(expert, base, tmp_path / "delta", density=0.5, alpha=1.5)
    found = load_file(restored_in(delta, base, tmp_path / "again") / "model.safetensors")
    assert found["w"].tolist() == [1.5, -1.5, 0, 0]


def test_weights_that_are_not_finite_are_kept_exactly(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", {"w": torch.zeros(3)})
    expert = model_folder(tmp_path / "expert", {"w": torch.tensor([float("nan"), float("inf"), -0.0])})
    found = restored_in(compressed(expert, base, tmp_path / "delta", density=0.1), base, tmp_path / "again")
    assert (found / "model.safetensors").read_bytes() == (expert / "model.safetensors").read_bytes()


def test_the_share_is_of_all_weights_across_chunks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    n = CHUNK + 1000
    base = model_folder(tmp_path / "base", {"w": torch.zeros(n), "small": torch.zeros(1000)})
    w, small = torch.randn(n), torch.randn(1000) * 1e-3
    expert = model_folder(tmp_path / "expert", {"w": w, "small": small})
    delta = compressed(expert, base, tmp_path / "delta", density=0.05)
    found = load_file(restored_in(delta, base, tmp_path / "again") / "model.safetensors")
    kept = found["w"] != 0
    assert int(kept.sum()) == round(0.05 * (n + 1000)) and not found["small"].any()
    assert w[kept].abs().min() >= w[~kept].abs().max()
    assert torch.equal(found["w"][kept].sign(), w[kept].sign())
    assert (delta / PAYLOAD).stat().st_size < (expert / "model.safetensors").stat().st_size / 80


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_factors_are_close_to_the_product_of_an_adapter(tmp_path: Path, density: float) -> None:
    """The singular vectors are tried beside A and B, whose share would be a poor choice alone."""
    torch.manual_seed(0)
    mixed = torch.randn(8, 8)  # the rows and columns of a pair say nothing: any mix of them is the same adapter
    a = mixed @ (torch.randn(8, 96) * 0.5 ** torch.arange(8)[:, None])
    b = torch.randn(64, 8) @ torch.linalg.inv(mixed)
    expert = adapter_folder(tmp_path / "adapter", {"q": (a, b), "other": (torch.zeros(8, 4), torch.zeros(4, 8))})
    delta = compressed(expert, None, tmp_path / "delta", density=density)
    found = load_file(restored_in(delta, None, tmp_path / "again") / "adapter_model.safetensors")
    near = found["base_model.model.q.lora_B.weight"] @ found["base_model.model.q.lora_A.weight"]
    plain_a, plain_b = (torch.from_numpy(ternary(part.numpy(), density)[0]).float() for part in (a, b))
    assert cosine(near, b @ a) >= cosine(plain_b @ plain_a, b @ a) + (0.2 if density < 0.5 else -1e-3)
    assert float((near * (b @ a)).sum() / near.norm() ** 2) == pytest.approx(1, abs=1e-3)  # the best multiple
    for name in ("lora_A", "lora_B"):
        matrix = found[f"base_model.model.q.{name}.weight"]
        assert int((matrix != 0).sum()) == round(density * matrix.numel())
        assert len(set(matrix.abs().unique().tolist())) == 2
        assert not found[f"base_model.model.other.{name}.weight"].any()
