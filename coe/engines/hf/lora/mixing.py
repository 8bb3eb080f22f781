"""Rows with different LoRA adapters in one batch: two batched matrix products per layer for any number of adapters.

peft runs each adapter on its own rows, one after the other; with several adapters and short inputs, that takes as long
as the base layers. Here the low-rank matrices of a batch are stacked, and every row is multiplied with its own pair:

    output[i] += scaling[i] * input[i] A[i]^T B[i]^T        A: (n_rows, r, n_in), B: (n_rows, n_out, r)

which is what the kernels of Punica compute (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor


_MOST_BYTES: Final = 512 * 2**20
"""Most bytes of the stacks of a batch, which are copies; above, peft's slower method is used, which copies nothing."""


@dataclass(slots=True)
class RowAdapters:
    """The adapter of each row of the next forward: (n_rows,) positions in the stacks.

    Attributes:
        adapters: peft's names, in the order of the stacks.
        names: (n_rows,) the adapter of each row.
    """

    adapters: Sequence[str | None]
    names: list[str | None]
    positions: Tensor

    def select(self, names: Sequence[str | None]) -> None:
        """The rows of the next forward have these adapters, all of which are in the stacks."""
        if self.names != list(names):
            self.names = list(names)
            self.positions = self.positions.new_tensor([self.adapters.index(name) for name in names])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.select([self.names[row] for row in rows])


def can_mix(peft: Any, names: Collection[str | None], most_bytes: int | None = None) -> bool:
    """Whether these adapters change plain linear layers only, without biases, and copies of them are small."""
    if why_not_mixed(peft, names) is not None:
        return False
    return n_bytes(peft, names) <= (_MOST_BYTES if most_bytes is None else most_bytes)


def why_not_mixed(peft: Any, names: Collection[str | None]) -> str | None:
    """What of these adapters needs peft's own forward; None if they are low-rank updates of linear layers alone."""
    from peft.tuners.lora import Linear

    layers = _layers(peft, names)
    if (other := next((layer for layer in layers if type(layer) is not Linear), None)) is not None:
        return f"it adapts a {type(other.get_base_layer()).__name__}, which is not a linear layer"
    if any(not {*names}.isdisjoint(layer.lora_variant) for layer in layers):
        return "it is a variant of LoRA, such as DoRA"
    if any(layer.lora_bias.get(name) for layer in layers for name in names if name is not None):
        return "it has biases"
    return None


def n_bytes(peft: Any, names: Collection[str | None]) -> int:
    """Bytes of the low-rank matrices of these adapters."""
    pairs: list[Any] = [matrices for layer in _layers(peft, names) for matrices in (layer.lora_A, layer.lora_B)]
    return sum(int(matrices[name].weight.nbytes) for matrices in pairs for name in {*names} & matrices.keys())


def _layers(peft: Any, names: Collection[str | None]) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [layer for layer in peft.modules() if isinstance(layer, LoraLayer) and _has(layer, names)]


def _has(layer: Any, names: Collection[str | None]) -> bool:
    return not {*layer.lora_A, *layer.lora_embedding_A}.isdisjoint(names)


@contextmanager
def mixed(peft: Any, names: Sequence[str | None]) -> Iterator[RowAdapters]:
    """Apply to each row of every forward in the block the adapter of that row; `None` is the bare base.

    Forwards in the block run without gradients.

    Args:
        peft: a peft model whose layers `can_mix`.
        names: (n_rows,) peft's names of loaded adapters. `RowAdapters.select` changes the rows.
    """
    import torch
    from peft.tuners.lora import Linear

    adapters = list(dict.fromkeys(names))
    positions = torch.tensor([adapters.index(name) for name in names], device=peft.device)
    rows = RowAdapters(adapters, list(names), positions)
    with peft.disable_adapter(), ExitStack() as hooks:
        for layer in peft.modules():
            if isinstance(layer, Linear) and not layer.lora_A.keys().isdisjoint(adapters):
                with torch.no_grad():
                    hook = partial(_add, rows, *_stacks(layer, adapters))
                hooks.callback(layer.base_layer.register_forward_hook(hook).remove)
        yield rows


def _add(rows: RowAdapters, a: Tensor, b: Tensor, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook of a base layer: its output (n_rows, n_tokens, n_out) plus the low-rank update of each row."""
    low_rank = inputs[0] @ a[rows.positions].mT  # (n_rows, n_tokens, r)
    return output + low_rank @ b[rows.positions].mT


def _stacks(layer: Any, adapters: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """A (n_adapters, r, n_in) and scaled B (n_adapters, n_out, r) of a layer; zeros if an adapter has none here."""
    import torch

    here = [name for name in adapters if name in layer.lora_A]
    first = layer.lora_A[here[0]].weight
    rank = max(layer.lora_A[name].weight.shape[0] for name in here)
    a = first.new_zeros(len(adapters), rank, layer.in_features)
    b = first.new_zeros(len(adapters), layer.out_features, rank)
    for position, name in enumerate(adapters):
        if name in here:
            weight_a, weight_b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a[position, : len(weight_a)] = weight_a
            b[position, :, : len(weight_a)] = torch.mul(weight_b, layer.scaling[name])
    return a, b
