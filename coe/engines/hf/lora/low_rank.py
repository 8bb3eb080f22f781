"""Low-rank updates of linear layers, the common kind of LoRA adapter: two matrices per layer, kept beside the model.

Hooks on the layers add them to the rows that have them:

    output[i] += (input[i] A^T) B^T        A: (r, n_in), B: (n_out, r), scaled, those of row i

Rows with different adapters take two batched products per layer, of matrices stacked by row, which is what the kernels
of Punica compute (arXiv 2310.18547). The model is not changed: peft instead wraps its layers, and visits all modules
for every adapter, so that a load takes the longer the more adapters there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import linear

from registry.lora.combining import why_not_mixed
from registry.lora.plan import PEFT_PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.adapter_files import AdapterFiles
    from registry.lora.plan import LoraPlan

Update = tuple["Tensor", "Tensor"]
"""A (r, n_in) and scaled B (n_out, r)."""

_MOST_STACKED: Final = 512 * 2**20
"""Most bytes of the matrices stacked by row, which are copies; above, adapters take turns, which copies nothing."""
_SELECTIONS: Final = 4
"""Most sets of rows whose stacks are kept, within those bytes: the running batch, and prompts that join it."""


class LowRankAdapters:
    """The low-rank adapters of one model, by name.

    Args:
        model: a transformers causal model, no layer of which is wrapped yet.
    """

    def __init__(self, model: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        self.model = model
        plain = (torch.nn.Linear, Conv1D)
        self._modules = {name: module for name, module in model.named_modules() if type(module) in plain}
        self._updates: dict[str, dict[str, Update]] = {}  # adapter -> layer -> its update

    def __contains__(self, name: object) -> bool:
        return name in self._updates

    def why_not(self, plan: LoraPlan) -> str | None:
        """What of an adapter is no low-rank update of a linear layer of this model; None if it has nothing else."""
        if (reason := why_not_mixed(plan)) is not None:
            return reason
        other = next((name for name in plan.ranks if name not in self._modules), None)
        if other is None:
            return None
        return f"it adapts a {type(self.model.get_submodule(other)).__name__}, which is not a linear layer"

    def add(self, name: str, files: AdapterFiles) -> None:
        """Keep an adapter, in the type and on the device of the layers. For one of which `why_not` is None."""
        plan, tensors = files.plan, files.low_rank()
        updates: dict[str, Update] = {}
        for layer, rank in plan.ranks.items():
            weight = self._modules[layer].weight
            a, b = (tensors[f"{PEFT_PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
            scaling = plan.alphas[layer] / (rank**0.5 if plan.config.use_rslora else rank)
            updates[layer] = a.to(weight.device, weight.dtype), (b.float() * scaling).to(weight.device, weight.dtype)
        self._updates[name] = updates

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is here."""
        self._updates.pop(name, None)

    def update(self, layer: str, name: str) -> Update | None:
        """What an adapter adds to a layer, if anything."""
        return self._updates[name].get(layer)

    def layers(self, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """The layers that these adapters change, by name, in the order of the model."""
        changed = set[str]().union(*(self._updates[name] for name in names))
        return ((layer, module) for layer, module in self._modules.items() if layer in changed)

    def n_bytes(self, names: Collection[str]) -> int:
        """Bytes of the matrices of these adapters."""
        return sum(a.nbytes + b.nbytes for name in names for a, b in self._updates[name].values())

    @contextmanager
    def applied(self, names: Collection[str]) -> Iterator[RowUpdates]:
        """Add to every row of each forward in the block the update of its adapter: see `RowUpdates.select`."""
        rows = RowUpdates(self)
        with ExitStack() as hooks:
            for layer, module in self.layers(names):
                hooks.callback(module.register_forward_hook(partial(rows.add, layer)).remove)
            yield rows


class RowUpdates:
    """The adapter of each row of the next forward, and its matrices."""

    def __init__(self, adapters: LowRankAdapters) -> None:
        self._adapters = adapters
        self._names: tuple[str | None, ...] = ()
        self._stacks: dict[tuple[str | None, ...], dict[str, Update | None]] = {}  # by rows and layer, latest last
        self._stacked = True

    def select(self, names: Sequence[str | None]) -> None:
        """The rows of the next forward have these adapters; `None`, and names that are not here, add nothing."""
        self._names = tuple(name if name in self._adapters else None for name in names)
        self._stacks[self._names] = self._stacks.pop(self._names, {})
        self._stacked = self._n_bytes(self._names) <= _MOST_STACKED
        while len(self._stacks) > 1 and (
            len(self._stacks) > _SELECTIONS or sum(map(self._n_bytes, self._stacks)) > _MOST_STACKED
        ):
            del self._stacks[next(iter(self._stacks))]

    def _n_bytes(self, names: Sequence[str | None]) -> int:
        return self._adapters.n_bytes([name for name in names if name is not None and name in self._adapters])

    def add(self, layer: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of a layer: its output (n_rows, n_tokens, n_out), or without rows (n_rows * n_tokens, n_out),
        and the updates."""
        kinds = set(self._names)
        if len(kinds) == 1:
            [name] = kinds
            pair = None if name is None else self._adapters.update(layer, name)
            return output if pair is None else output + linear(linear(inputs[0], pair[0]), pair[1])
        x = inputs[0].reshape(len(self._names), -1, inputs[0].shape[-1])
        if not self._stacked:
            return self._in_turn(layer, x, output)
        stack = self._stacks[self._names]
        if layer not in stack:
            stack[layer] = self._by_row(layer)
        if (pair := stack[layer]) is None:
            return output
        return output + ((x @ pair[0].mT) @ pair[1].mT).reshape(output.shape)

    def _by_row(self, layer: str) -> Update | None:
        """A (n_rows, r, n_in) and B (n_rows, n_out, r) of the rows; zeros where a row has no update here."""
        pairs = [None if name is None else self._adapters.update(layer, name) for name in self._names]
        some = next((pair for pair in pairs if pair is not None), None)
        if some is None:
            return None
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        with torch.inference_mode(False), torch.no_grad():  # a forward with gradients may use them, too
            a = some[0].new_zeros(len(pairs), rank, some[0].shape[1])
            b = some[1].new_zeros(len(pairs), len(some[1]), rank)
            for row, pair in enumerate(pairs):
                if pair is not None:
                    a[row, : len(pair[0])] = pair[0]
                    b[row, :, : len(pair[0])] = pair[1]
        return a, b

    def _in_turn(self, layer: str, x: Tensor, output: Tensor) -> Tensor:
        """The updates of one adapter after the other, each on its own rows."""
        added = output.clone().reshape(len(self._names), -1, output.shape[-1])
        for name in dict.fromkeys(self._names):
            if name is not None and (pair := self._adapters.update(layer, name)) is not None:
                rows = [row for row, own in enumerate(self._names) if own == name]
                added[rows] += linear(linear(x[rows], pair[0]), pair[1])
        return added.reshape(output.shape)
