"""The weights of an adapter's base by name, whether read from headers or from a model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from registry.inspection import Facts

Shape = tuple[int, ...]

_BLOCK: Final = re.compile(r"\.(layers|h|blocks?)\.(?P<layer>\d{1,9})\.")
_HEADS: Final = ("lm_head", "embed_out")
_EMBEDDINGS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "token_embd")


class BaseWeights:
    """Finds modules and parameters of a base by the names that an adapter uses.

    Wrappers add prefixes, so a name is found as it is, or else by its unique end. The head of a model with tied
    embeddings is in no file; its weight is the embedding's.

    Args:
        shapes: of all parameters, by name.
        gguf_name: the name in a GGUF file of a parameter of transformers, or an empty text.
        layers: the number of layers of the model; files may have more, which are not loaded.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        gguf_name: Callable[[str], str] | None = None,
        layers: int | None = None,
    ) -> None:
        self.shapes = shapes
        self._gguf_name = gguf_name
        self._by_end: dict[str, list[str]] = {}
        for name in shapes:
            self._by_end.setdefault(_end_of(name), []).append(name)
        found = [name for name in shapes if name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS]
        self._embedding = found[0] if len(found) == 1 else None
        self.modules = tuple(
            name.removesuffix(".weight")
            for name in shapes
            if _is_matrix(name, shapes[name]) and (layers is None or _layer(name) < layers)
        )

    @property
    def is_gguf(self) -> bool:
        """Whether the names are those of a GGUF file."""
        return self._gguf_name is not None

    def module(self, stated: str) -> str | None:
        """The base's name of a module, or `None`."""
        own = self.parameter(f"{stated}.weight")
        return None if own is None else own.removesuffix(".weight")

    def parameter(self, stated: str) -> str | None:
        """The base's name of a parameter, or `None`; transformers' name for one of a GGUF file."""
        if self._name(stated) in self.shapes:
            return stated
        same_end = self._by_end.get(_end_of(stated), [])
        if len(same_end) == 1:
            return same_end[0]
        is_head = not same_end and stated.removesuffix(".weight").rpartition(".")[2] in _HEADS
        return stated if is_head and self._embedding is not None else None

    def shape(self, own: str) -> Shape:
        """The shape of a parameter that `parameter` found."""
        return self.shapes[self.stored(own)]

    def stored(self, own: str) -> str:
        """The name under which the values of a found parameter are stored: a tied head's is the embedding's."""
        if (name := self._name(own)) in self.shapes:
            return name
        assert self._embedding is not None
        return self._embedding

    def _name(self, own: str) -> str:
        return own if self._gguf_name is None else self._gguf_name(own)


def base_weights(facts: Facts) -> BaseWeights:
    """The weights of a base from its headers."""
    shapes = {name: tensor.shape for name, tensor in facts.tensors.items()}
    gguf_name = _gguf_names(shapes, facts.architecture) if facts.is_gguf else None
    return BaseWeights(shapes, gguf_name, facts.layers)


def is_tied_end(module: str) -> bool:
    """Whether a module is an input embedding or a head, which may share their weights."""
    return module.rpartition(".")[2] in (*_HEADS, *_EMBEDDINGS)


def _layer(name: str) -> int:
    found = _BLOCK.search(f".{name}")
    return int(found["layer"]) if found else -1


def _is_matrix(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) >= 2


def _end_of(name: str) -> str:
    """`model.language_model.layers.3.mlp.up_proj.weight` -> `.layers.3.mlp.up_proj.weight`; else the last two parts."""
    if found := _BLOCK.search(f".{name}"):
        return f".{name}"[found.start() :]
    return ".".join(name.split(".")[-2:])


def _gguf_names(shapes: Iterable[str], architecture: str) -> Callable[[str], str]:
    """The GGUF name of a parameter, or an empty text."""
    import gguf

    known = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=0)
    names = gguf.get_tensor_name_map(known or gguf.MODEL_ARCH.LLAMA, blocks)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
