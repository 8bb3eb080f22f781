"""The key-value cache of a batch whose rows change: which caches can do that, and joining two of them.

Rows are left-padded: the last column is the newest token of every row, so a shorter row has padding on its left, which
the attention mask hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def is_selectable(inputs: Mapping[str, Any]) -> bool:
    """Whether rows can leave: the cache holds nothing but keys and values by row, and the inputs are by row.

    Args:
        inputs: of a model's forward, as transformers prepares them.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache, positions = inputs.get("past_key_values"), inputs.get("position_ids")
    by_row = positions is None or positions.ndim == 2  # image and video models have an additional leading axis
    return (
        by_row
        and isinstance(cache, DynamicCache)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    )


def is_joinable(inputs: Mapping[str, Any]) -> bool:
    """Whether rows can join, too: positions and mask are the only inputs by row."""
    import torch

    tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return is_selectable(inputs) and bool(inputs.get("use_cache")) and tensors <= {"attention_mask", "position_ids"}


def select_rows(cache: Any, rows: Sequence[int], device: Any) -> None:
    """Keep only these rows."""
    import torch

    cache.batch_select_indices(torch.tensor(rows, device=device))


def drop_columns(cache: Any, n: int) -> None:
    """Remove the first `n` columns, which are padding in every row."""
    for layer in cache.layers:
        if layer.is_initialized:
            n_left = layer.get_seq_length() - n
            if layer.is_sliding:  # it holds the last columns only
                layer.cumulative_length = n_left
            layer.keys, layer.values = _last(layer.keys, n_left), _last(layer.values, n_left)


def join(cache: Any, other: Any) -> None:
    """Append the rows of another cache of the same model to `cache`; the last columns of both stand together.

    If that fails, such as for lack of memory, `cache` is as before.
    """
    before = []
    try:
        for mine, theirs in zip(cache.layers, other.layers, strict=True):
            if not mine.is_initialized:  # a layer that reads the cache of another one
                continue
            n_rows, n_columns, length = mine.keys.shape[0], mine.keys.shape[-2], mine.get_seq_length()
            keys, values = _joined(mine.keys, theirs.keys), _joined(mine.values, theirs.values)
            mine.keys, mine.values = keys, values
            if mine.is_sliding:
                mine.cumulative_length = max(length, theirs.get_seq_length())
            before.append((mine, n_rows, n_columns, length))
    except BaseException:
        for layer, n_rows, n_columns, length in before:
            layer.keys, layer.values = layer.keys[:n_rows], layer.values[:n_rows]
            layer.keys, layer.values = _last(layer.keys, n_columns), _last(layer.values, n_columns)
            if layer.is_sliding:
                layer.cumulative_length = length
        raise


def padded_left(tensor: Tensor, n_columns: int) -> Tensor:
    """A tensor (n_rows, n) with zeros before it: (n_rows, n_columns)."""
    import torch

    missing = tensor.new_zeros(len(tensor), n_columns - tensor.shape[1])
    return torch.cat([missing, tensor], dim=1)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Keys or values (n_rows, n_heads, n_columns, n) of both; one allocation."""
    n_columns = max(a.shape[2], b.shape[2])
    both = a.new_zeros(len(a) + len(b), a.shape[1], n_columns, a.shape[3])
    both[: len(a), :, n_columns - a.shape[2] :] = a
    both[len(a) :, :, n_columns - b.shape[2] :] = b
    return both


def _last(tensor: Tensor, n_columns: int) -> Tensor:
    """The last columns, or all if there are no more."""
    return tensor[:, :, max(0, tensor.shape[2] - n_columns) :]
