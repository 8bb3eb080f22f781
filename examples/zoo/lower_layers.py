"""Training of the upper layers of a model alone: what the frozen lower ones give for a text is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.storage import atomic_path

if TYPE_CHECKING:
    import torch


class LowerLayers:
    """The hidden states that the layers below `first` give for token ids, kept in memory in the model's type.

    Args:
        decoder: a Llama-like decoder of transformers, whose layers below `first` are frozen.
        first: the first layer of the upper part, from 0.
        file: where `save` keeps the states for a resumed run of the same model and layer; read if it exists.
    """

    def __init__(self, decoder: Any, first: int, file: Path | None = None) -> None:
        self._decoder, self._first, self._layers, self._file = decoder, first, decoder.layers, file
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._n_saved = 0
        if file is not None and file.exists():
            self._load(file)

    def save(self) -> None:
        """Write the states to the file, if there are new ones."""
        from safetensors.torch import save_file

        if self._file is None or len(self._known) == self._n_saved:
            return
        with atomic_path(self._file) as path:
            save_file({",".join(map(str, text)): states for text, states in self._known.items()}, path)
        self._n_saved = len(self._known)

    def _load(self, file: Path) -> None:
        from safetensors.torch import load_file

        self._known = {tuple(map(int, text.split(","))): states for text, states in load_file(file).items()}
        self._n_saved = len(self._known)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Meanwhile the decoder consists of the upper layers; `states` are its `inputs_embeds`."""
        with self._only(self._layers[self._first :]):
            yield

    def states(self, texts: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        """(B, width, d) hidden states of right-padded texts."""
        import torch

        keys = [tuple(text) for text in texts]
        if new := [key for key in dict.fromkeys(keys) if key not in self._known]:
            self._compute(new)
        return torch.stack([torch.nn.functional.pad(self._known[key], (0, 0, 0, width - len(key))) for key in keys])

    def _compute(self, texts: Sequence[tuple[int, ...]]) -> None:
        import torch

        width = max(map(len, texts))
        ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
        with torch.no_grad(), self._only(self._layers[: self._first], norm=torch.nn.Identity()):
            found = self._decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        self._known |= {text: found[i, : len(text)].clone() for i, text in enumerate(texts)}

    @contextmanager
    def _only(self, layers: Any, norm: Any = None) -> Iterator[None]:
        decoder, config = self._decoder, self._decoder.config
        before = decoder.layers, decoder.norm, config.num_hidden_layers
        places = [layer.self_attn.layer_idx for layer in layers]
        decoder.layers, decoder.norm, config.num_hidden_layers = layers, norm or decoder.norm, len(layers)
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = i  # its place in a cache
        try:
            yield
        finally:
            decoder.layers, decoder.norm, config.num_hidden_layers = before
            for place, layer in zip(places, layers, strict=True):
                layer.self_attn.layer_idx = place
