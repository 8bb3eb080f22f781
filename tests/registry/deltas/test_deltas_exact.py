"""Exact deltas: every bit comes back, and what a base shares costs next to nothing."""

from pathlib import Path

import pytest
import torch
from delta_files import adapter_folder, compressed, model_folder, restored_in
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from registry.deltas.manifest import CHUNK, PAYLOAD, read_delta
from registry.deltas.restoring import OpenDelta
from registry.errors import SourceError
from registry.headers import read_weights


def bits(*values: int) -> torch.Tensor:
    """bfloat16 numbers of these bit patterns."""
    return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_the_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = {
        "half": torch.randn(7, 5).half(), "full": torch.randn(3, 11), "brain": torch.randn(4, 4).bfloat16(),
        "special": bits(0x7FC1, 0xFFA5, 0x8000, 0x0000, 0x7F80, 0x0001),  # NaNs with payloads, -0.0, 0, infinity
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "ids": torch.arange(6),
    }  # fmt: skip
    base = model_folder(tmp_path / "base", shared | {"grown": torch.randn(2, 2), "retyped": torch.randn(4)})
    changed = {name: value if name == "half" else value.clone() for name, value in shared.items()}
    changed["special"] = bits(0xFFC2, 0x7FA5, 0x0000, 0x8000, 0xFF80, 0x7FFF)
    changed["full"][1] += 1e-3
    own = {"grown": torch.randn(3, 2), "retyped": torch.randn(4).half(), "new": torch.randn(9)}
    expert = model_folder(tmp_path / "expert", changed | own, {"format": "pt", "of": "a test"})
    delta = compressed(expert, base, tmp_path / "delta")
    found = restored_in(delta, base, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (found / name).read_bytes() == (expert / name).read_bytes()
    opened = OpenDelta.open(delta)
    assert {name: coding for name, (coding, _) in opened.how.items()} == dict.fromkeys(shared, "xor") | dict.fromkeys(
        own, "whole"
    )
    assert opened.table == read_weights(expert)[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)), max_size=20))
def test_any_bits_come_back(tmp_path_factory: pytest.TempPathFactory, words: list[tuple[int, int]]) -> None:
    root = tmp_path_factory.mktemp("any")
    base = model_folder(root / "base", {"w": bits(*(then for then, _ in words))})
    expert = model_folder(root / "expert", {"w": bits(*(now for _, now in words))})
    again = restored_in(compressed(expert, base, root / "delta"), base, root / "again")
    assert (again / "model.safetensors").read_bytes() == (expert / "model.safetensors").read_bytes()


def test_tensors_of_several_chunks_and_shards(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = torch.randn(CHUNK + 10).half()
    base = model_folder(tmp_path / "base", {"a": weights, "b": torch.ones(3)})
    expert = tmp_path / "expert"
    expert.mkdir()
    tuned = weights.clone()
    tuned[CHUNK - 1 :] *= 1.01
    save_file({"a": tuned}, expert / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, expert / "model-00002-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (expert / "model.safetensors.index.json").write_text(index)
    (expert / "config.json").write_text("{}")
    delta = compressed(expert, base, tmp_path / "delta")
    found = restored_in(delta, base, tmp_path / "again")
    assert {file.name for file in found.iterdir()} == {file.name for file in expert.iterdir()}
    assert all((found / file.name).read_bytes() == file.read_bytes() for file in expert.iterdir())
    assert (delta / PAYLOAD).stat().st_size < 5_000 < expert.joinpath("model-00001-of-00002.safetensors").stat().st_size


def test_an_adapter_is_stored_whole(tmp_path: Path) -> None:
    expert = adapter_folder(tmp_path / "adapter", {"q": (torch.randn(4, 16), torch.randn(8, 4))})
    delta = compressed(expert, None, tmp_path / "delta")
    assert read_delta(delta).base is None
    found = restored_in(delta, None, tmp_path / "again")
    assert (found / "adapter_model.safetensors").read_bytes() == (expert / "adapter_model.safetensors").read_bytes()


def test_another_base_is_noticed(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", {"w": torch.zeros(4)})
    expert = model_folder(tmp_path / "expert", {"w": torch.ones(4)})
    delta = compressed(expert, base, tmp_path / "delta")
    other = model_folder(tmp_path / "other", {"w": torch.full((4,), 2.0)})
    with pytest.raises(SourceError, match="restored model.safetensors is not the one that was stored"):
        restored_in(delta, other, tmp_path / "again")
    smaller = model_folder(tmp_path / "smaller", {"w": torch.zeros(3)})
    with pytest.raises(SourceError, match="is not the base of .*: w is missing or of another shape"):
        restored_in(delta, smaller, tmp_path / "again2")
    with pytest.raises(SourceError, match="needed to restore it"):
        restored_in(delta, None, tmp_path / "again3")
