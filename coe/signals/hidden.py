"""Hidden states and uncertainty of a model, from one forward pass over a prompt.

The model is loaded with the loader of the hf engine, in float32, so that a prompt has the same signals alone and in a
batch, up to rounding. Prompts are read raw, without a chat template, up to `MAX_TOKENS`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.engine_config import HFConfig
from coe.engines.hf.load import LoadedModel, translate
from coe.errors import EngineError
from coe.experts import locate
from coe.latent.by_length import batches
from coe.latent.loading import load_weights
from registry.spec import ExpertSpec
from registry.storage import coe_home
from routers.encoders.store import EmbeddingStore

MAX_TOKENS: Final = 256
"""Of a prompt; the rest is not read."""
N_UNCERTAINTY: Final = 4
"""Columns of the uncertainty, which follow those of the hidden states."""
_FORMAT: Final = 1
_TOKENS_AT_ONCE: Final = 1024
_DTYPE: Final = "float32"

Vectors = NDArray[np.float32]


class SignalReader:
    """Reads signals with the model of one expert, loaded on first use; safe to share between threads.

    Args:
        spec: of kind `model`.
        find: folder of its verified files; may block.
        device: as for the hf engine.
    """

    at_once: Final = 64
    """Texts read and stored together."""

    def __init__(self, spec: ExpertSpec, *, find: Callable[[ExpertSpec], Path] = locate, device: str = "auto") -> None:
        self.spec = spec
        self._find, self._settings = find, HFConfig(device=device, dtype=_DTYPE)
        self._lock = threading.Lock()
        self._loaded: LoadedModel | None = None

    def read(self, texts: Sequence[str]) -> Vectors:
        """(n, 2 h + 4) for n texts: hidden states, then uncertainty.

        Raises:
            WeightsError, OutOfMemory: the model cannot be loaded. EngineError: it failed.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = load_weights(self.spec, self._settings, find=self._find)
            with translate(f"{self.spec.name!r} failed while reading prompts", EngineError):
                return _read(self._loaded, texts)

    def store(self) -> EmbeddingStore:
        """The store on disk of signals that were read, keyed by the model's digest."""
        key = f"signals-{_FORMAT} {self.spec.digest or self.spec.ref} {MAX_TOKENS} {_DTYPE}"
        return EmbeddingStore(coe_home() / "signals" / f"{hashlib.sha256(key.encode()).hexdigest()}.sqlite")


def _read(loaded: LoadedModel, texts: Sequence[str]) -> Vectors:
    import torch

    ids = [_tokens(loaded, text) for text in texts]
    signals = np.empty((len(texts), 2 * loaded.model.config.get_text_config().hidden_size + N_UNCERTAINTY), np.float32)
    with torch.inference_mode():
        for rows in batches([len(each) for each in ids], most_tokens=_TOKENS_AT_ONCE):
            for row, values in zip(rows, _read_batch(loaded.model, [ids[row] for row in rows]), strict=True):
                signals[row] = values
    return signals


def _tokens(loaded: LoadedModel, text: str) -> list[int]:
    valid = text.encode("utf-8", "replace").decode("utf-8")  # JSON may carry lone surrogates
    ids: list[int] = loaded.tokenizer(valid, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids or [min(loaded.eos, default=0)]  # a forward pass needs a token


def _read_batch(model: Any, ids: Sequence[Sequence[int]]) -> Iterator[Vectors]:
    """(2 h + 4,) for each row. Padding is on the right, which a causal model does not attend to."""
    import torch

    width = max(map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
    states = model.base_model(
        input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    for row, length in enumerate(map(len, ids)):
        middle, last = states[len(states) // 2][row, length - 1], states[-1][row, :length]
        uncertainty = _uncertainty(_log_probabilities(model, last), tokens[row, :length])
        yield torch.cat([middle, last[-1], uncertainty]).float().cpu().numpy()


def _log_probabilities(model: Any, states: Any) -> Any:
    """(tokens, vocabulary): log-probabilities of the token after each position."""
    import torch

    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)


def _uncertainty(log_p: Any, tokens: Any) -> Any:
    import torch

    last, count = log_p[-1], len(tokens)
    likelihood = log_p[:-1].gather(1, tokens[1:, None]).mean() if count > 1 else last.new_zeros(())
    entropy = -(last.exp() * last).sum()
    return torch.stack([entropy, last.max().exp(), likelihood, last.new_tensor(count).log()])
