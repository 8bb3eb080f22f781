"""Rows with a mixture of adapters beside rows with one adapter or none: two matrix products per layer.

The low-rank matrices of all adapters of a batch are concatenated, and every token weighs its adapters:

    output[i, t] += (w[i, t] * (input[i, t] A^T)) B^T        A: (R, n_in), B: (n_out, R), R the sum of the ranks

w[i, t] has the weight of an adapter at each of its ranks: what a gate gives for a row with a mixture, 1 at the adapter
of a row that has one, and 0 for the bare base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from coe.engines.hf.lora.gates.gate import AdaptedLayer
from coe.engines.hf.lora.low_rank import LowRankAdapters
from coe.engines.hf.lora.mixture import MixtureSlot, QueryMixture, RowSlot, name_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class _Group:
    """The rows of the next forward that have one mixture.

    Attributes:
        slot: the mixture. columns: its members among the adapters of the batch.
        rows: their positions; None: all rows, and the members are all adapters in their order.
        query: (n, n_members) what their queries add to the gate's logits.
    """

    slot: MixtureSlot
    columns: Tensor
    rows: Tensor | None
    query: Tensor | None


@dataclass(slots=True)
class TokenWeights:
    """The weights of the adapters of a batch for each row and token of the next forward.

    Attributes:
        adapters: their names.
        mixtures: by name; rows have these, one of the adapters, or nothing.
        device: of the model.
    """

    adapters: Sequence[str]
    mixtures: Mapping[str, MixtureSlot]
    device: Any
    _plain: Tensor | None = None
    _groups: list[_Group] = field(default_factory=list)
    _slots: list[RowSlot] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the next forward."""
        return len(self._slots or ())

    def select(self, slots: Sequence[RowSlot]) -> None:
        """The rows of the next forward have these adapters and mixtures."""
        if self._slots is not None and _same(self._slots, slots):
            return
        self._slots = list(slots)
        names = [name_of(slot) for slot in slots]
        one_hot = [[float(name == adapter) for adapter in self.adapters] for name in names]
        self._plain = torch.tensor(one_hot, device=self.device)[:, None]  # (n_rows, 1, n_adapters)
        self._groups = [self._group(name, slots) for name in dict.fromkeys(names) if name in self.mixtures]

    def of(self, h: Tensor, numbers: Mapping[str, int]) -> Tensor:
        """Weights for one layer, (n_rows, n_tokens or 1, n_adapters).

        Args:
            h: (n_rows, n_tokens, n_in) the layer's input.
            numbers: mixture -> number of the layer for its gate, where it adapts the layer.
        """
        assert self._plain is not None
        weights = self._plain
        for group in self._groups:
            if (number := numbers.get(group.slot.name)) is None:
                continue
            if group.rows is None:
                return group.slot.gate.forward(number, h, group.query)
            if weights is self._plain:
                weights = weights.repeat(1, h.shape[1], 1)
            weighed = group.slot.gate.forward(number, h[group.rows], group.query)
            weights[group.rows[:, None], :, group.columns] = weighed.permute(0, 2, 1)
        return weights

    def _group(self, name: str | None, slots: Sequence[RowSlot]) -> _Group:
        assert name is not None
        slot = self.mixtures[name]
        rows = [row for row, each in enumerate(slots) if name_of(each) == name]
        queries = [each.query for each in slots if isinstance(each, QueryMixture) and each.name == name]
        query = None if any(each is None for each in queries) else torch.stack([q for q in queries if q is not None])
        whole = len(rows) == len(slots) and tuple(self.adapters) == slot.members
        columns = torch.tensor([self.adapters.index(member) for member in slot.members], device=self.device)
        return _Group(slot, columns, None if whole else torch.tensor(rows, device=self.device), query)


def _same(a: Sequence[RowSlot], b: Sequence[RowSlot]) -> bool:
    return len(a) == len(b) and all(x is y or x == y for x, y in zip(a, b, strict=True))


@contextmanager
def mixed_by_token(
    low_rank: LowRankAdapters, names: Sequence[str | None], mixtures: Mapping[str, MixtureSlot]
) -> Iterator[TokenWeights]:
    """Apply to each row of every forward in the block its adapter or mixture. Gates may be in training.

    Args:
        low_rank: the adapters of the model.
        names: of the adapters and mixtures that rows may have; None is the bare base.
        mixtures: those among the names.
    """
    used = [mixtures[name] for name in names if name is not None and name in mixtures]
    plain = [name for name in names if name is not None and name not in mixtures]
    adapters = list(dict.fromkeys([*(member for slot in used for member in slot.members), *plain]))
    weights = TokenWeights(adapters, mixtures, low_rank.model.device)
    with ExitStack() as hooks:
        for layer, module in low_rank.layers(adapters):
            numbers = {slot.name: slot.gate.numbers[layer] for slot in used if layer in slot.gate.numbers}
            hook = _Update.of(low_rank, layer, adapters, weights, numbers)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield weights


def layers_of(low_rank: LowRankAdapters, members: Sequence[str]) -> list[AdaptedLayer]:
    """What these adapters change, for a gate."""
    n_layers = low_rank.model.config.get_text_config().num_hidden_layers
    return [
        AdaptedLayer(layer, _number(layer) / n_layers, tuple(low_rank.update(layer, member) for member in members))
        for layer, _ in low_rank.layers(members)
    ]


def _number(name: str) -> int:
    """Number of the decoder layer that a module is in; 0 outside of them."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


@dataclass(frozen=True, slots=True)
class _Update:
    """A forward hook of a base layer: adds the weighed updates.

    Attributes:
        a: (R, n_in). b: (n_out, R), scaled. owners: (R,) the adapter of each rank.
        exact: products of adapters that a token does not use may be infinite in float16; they are left out, not
            multiplied by 0.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    weights: TokenWeights
    numbers: Mapping[str, int]
    exact: bool

    @classmethod
    def of(
        cls,
        low_rank: LowRankAdapters,
        layer: str,
        adapters: Sequence[str],
        weights: TokenWeights,
        numbers: Mapping[str, int],
    ) -> _Update:
        pairs = {number: low_rank.update(layer, name) for number, name in enumerate(adapters)}
        here = {number: pair for number, pair in pairs.items() if pair is not None}
        with torch.no_grad():
            a = torch.cat([pair[0] for pair in here.values()])
            b = torch.cat([pair[1] for pair in here.values()], dim=1)
        owners = torch.tensor([number for number, pair in here.items() for _ in pair[0]], device=a.device)
        return cls(a, b, owners, weights, numbers, exact=a.dtype is torch.float16)

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A layer may get all tokens without rows: (n_rows * n_tokens, n_in).
        h = inputs[0].reshape(self.weights.n_rows, -1, inputs[0].shape[-1])
        weights = self.weights.of(h, self.numbers).to(h.dtype)[..., self.owners]
        low_rank = torch.nn.functional.linear(h, self.a)  # (n_rows, n_tokens, R)
        if self.exact:
            low_rank = low_rank.masked_fill(weights == 0, 0)
        return output + torch.nn.functional.linear(low_rank * weights, self.b).reshape(output.shape)
