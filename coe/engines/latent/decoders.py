"""Where the decoder layers, the final norm, the head and the rotary embedding are: one table, by architecture.

Compositions read and change hidden states with hooks on these modules. No forward is written by hand: masks, positions
and sliding windows stay those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from coe.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of the modules in a causal language model of transformers.

    by_type: whether the rotary embedding is another one for each type of layer (full or sliding attention).
    """

    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    by_type: bool = False


LAYOUTS: Final[Mapping[str, Layout]] = {
    "LlamaForCausalLM": Layout(),
    "Gemma3ForCausalLM": Layout(by_type=True),
    "Qwen2ForCausalLM": Layout(),
    "Qwen3ForCausalLM": Layout(),
    "MistralForCausalLM": Layout(),
}
"""The architectures whose states can be read and changed. Each is covered by tests."""

_BY_LENGTH: Final = ("dynamic", "longrope")
"""Types of rotary embeddings whose frequencies depend on the length of the text: a rotated key would not fit others."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """The parts of a loaded model.

    Attributes:
        layers: the decoder layers in order; the output of `layers[l - 1]` are the hidden states after layer l.
        norm: the final norm; its output is what the head reads.
        head: the language-model head. rotary: the rotary embedding.
        width: of the hidden states. n_kv_heads, head_dim: of the key-value cache. n_tokens: ids that the model reads.
    """

    layers: Any
    norm: Any
    head: Any
    rotary: Any
    by_type: bool
    width: int
    n_kv_heads: int
    head_dim: int
    n_tokens: int
    config: Any

    @classmethod
    def of(cls, model: Any, *, expert: str = "the model") -> Decoder:
        """The parts of a causal language model; one with adapters has the same.

        Args:
            expert: name for error messages.

        Raises:
            Unsupported: an architecture that LAYOUTS does not have, with the list.
        """
        architecture = type(model).__name__
        if (layout := LAYOUTS.get(architecture)) is None:
            raise Unsupported(
                f"{expert!r} is a {architecture}, whose hidden states cannot be read or changed; "
                f"supported are {', '.join(LAYOUTS)}"
            )
        config = model.config.get_text_config()
        paths = (layout.layers, layout.norm, layout.head, layout.rotary)
        layers, norm, head, rotary = (attrgetter(path)(model) for path in paths)
        return cls(
            layers,
            norm,
            head,
            rotary,
            by_type=layout.by_type,
            width=config.hidden_size,
            n_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            n_tokens=model.get_input_embeddings().weight.shape[0],
            config=config,
        )

    @property
    def device(self) -> Any:
        """Where the head's weights are."""
        return self.head.weight.device

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def at(self, layer: int) -> Any:
        """The module whose output are the hidden states after this layer, counted from 1; 0 is the final norm."""
        return self.layers[layer - 1] if layer else self.norm

    @contextmanager
    def states(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Within the block, collect the hidden states (n_rows, n_tokens, d) after layers, of the first forward.

        Args:
            layers: as for `at`.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int, _module: Any, _inputs: Any, output: Any) -> None:
            found.setdefault(layer, output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(self.at(layer).register_forward_hook(partial(keep, layer)).remove)
            yield found

    def rotation(self, layer: int, distance: int, device: Any = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (head_dim,) float32 each, that move keys of a layer on by `distance` positions.

        Args:
            layer: counted from 0, as the key-value cache counts.

        Raises:
            Unsupported: the frequencies depend on the length of the text.
        """
        import torch

        kind = self.config.layer_types[layer] if self.by_type else None
        rope_type = self.rotary.rope_type if kind is None else self.rotary.rope_type[kind]
        if rope_type in _BY_LENGTH:
            raise Unsupported(
                f"keys cannot be moved to other positions with the rotary embedding {rope_type!r}, whose frequencies "
                "depend on the length of the text"
            )
        position = torch.tensor([[distance]], device=device)
        like = torch.zeros(1, dtype=torch.float32, device=device)
        cos, sin = self.rotary(like, position) if kind is None else self.rotary(like, position, kind)
        # Some types scale what they rotate; the keys have been scaled already.
        scale = getattr(self.rotary, "attention_scaling" if kind is None else f"{kind}_attention_scaling")
        return cos[0, 0] / scale, sin[0, 0] / scale
