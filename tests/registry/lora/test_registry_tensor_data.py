from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from registry.errors import SourceError
from registry.headers import Tensor, read_safetensors
from registry.lora import tensors as tensor_data
from registry.lora.tensors import all_finite, equal

VALUES = torch.tensor([[1.0, -2.5, 0.0], [3.25, 0.15625, -0.0]])


def written(folder: Path, **tensors: torch.Tensor) -> dict[str, Tensor]:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"{'-'.join(tensors)}.safetensors")
    return read_safetensors(folder / f"{'-'.join(tensors)}.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("piece", [1, 4, 2**20])
def test_equal_values_of_any_type(
    tmp_path: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_data, "_PIECE", piece)
    found = written(tmp_path, a=VALUES, b=VALUES.to(dtype), c=VALUES.to(dtype) + 1, d=VALUES.reshape(3, 2))
    assert equal(found["a"], found["b"]) and equal(found["b"], found["a"]) and equal(found["c"], found["c"])
    assert not equal(found["a"], found["c"])
    assert not equal(found["a"], found["d"])


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    near = np.nextafter(VALUES.numpy(), np.float32(9))
    found = written(tmp_path, a=VALUES, b=torch.from_numpy(near), c=VALUES.to(torch.bfloat16))
    assert not equal(found["a"], found["b"]) and not equal(found["c"], found["b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, bad: str) -> None:
    spoilt = VALUES.clone()
    spoilt[1, 2] = float(bad)
    found = written(tmp_path, good=VALUES.to(dtype), bad=spoilt.to(dtype), whole=torch.arange(3))
    assert all_finite(found["good"]) and all_finite(found["whole"])
    assert not all_finite(found["bad"])


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    found = written(tmp_path, a=VALUES)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="was truncated while it was read"):
        all_finite(found["a"])
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        all_finite(found["a"])
