"""Which files take the place of others in a running process; vLLM is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_models import save_other_weights

from coe.engines.vllm.slot import fits_in_place
from coe.errors import WeightsError


def test_only_files_with_the_same_config_tokenizer_and_tensors_fit_in_place(tiny: Path, tmp_path: Path) -> None:
    other = save_other_weights(tiny, tmp_path / "other")
    assert fits_in_place("other", other, tiny)
    assert not fits_in_place("other", other, None)
    assert not fits_in_place("other", other, tmp_path / "deleted")
    for file, old, new in (
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("tokenizer.json", '"version": "1.0"', '"version":  "1.0"'),
    ):
        text = (other / file).read_text()
        assert old in text
        (other / file).write_text(text.replace(old, new))
        assert not fits_in_place("other", other, tiny)
        (other / file).write_text(text)
    assert fits_in_place("other", other, tiny)


def test_damaged_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    other = save_other_weights(tiny, tmp_path / "other")
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="'other' cannot be loaded"):
        fits_in_place("other", other, tiny)
