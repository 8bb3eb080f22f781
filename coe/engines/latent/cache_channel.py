"""The channel `cache`: key-value entries of a peer's answer among those of the expert that reads them.

Both are experts on one base, so the heads of the reader can read the entries as they are. A row has these columns, and
its positions are the numbers of its columns:

    [prompt][entries of peer 1][entries of peer 2]...[suffix]

The suffix ends the turn of the peers and opens that of the reader: what the chat template writes between two answers,
or the last token of a prompt without template. The columns of the entries are read with the tokens of the peers'
answers, and what that leaves in the cache is overwritten with the entries before the suffix is read. A peer that read
the same prompt has its first entry where the reader needs it, so the entries of the first peer stay as they are, bit
for bit; others are moved by a rotation of their keys.

Serving and training use the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coe.engines.latent.decoders import Decoder
from coe.engines.latent.notes import Notes
from coe.engines.latent.spans import Turns
from coe.errors import Rejected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Entries:
    """Keys and values, (L, H, n, D) each, for the columns from `first` of a row on."""

    first: int
    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return int(self.keys.shape[2])


@dataclass(frozen=True, eq=False, slots=True)
class Columns:
    """The columns of one row, without padding.

    Attributes:
        ids: tokens of prompt, entries and suffix.
        n_prompt, n_suffix: tokens of the prompt, and of the suffix (0 if there are no entries).
        entries: what to put into the cache, in the order of the columns.
    """

    ids: list[int]
    n_prompt: int
    n_suffix: int
    entries: tuple[Entries, ...]

    @property
    def n_read(self) -> int:
        """Columns to read before the entries are put into the cache; the suffix follows."""
        return len(self.ids) - self.n_suffix


def lay_out(
    decoder: Decoder, prompt: Sequence[int], peers: Sequence[Notes], suffix: Sequence[int], *, like: Tensor
) -> Columns:
    """The columns of a row that reads the entries of these peers. Peers without an entry leave nothing.

    Args:
        prompt, suffix: token ids.
        peers: notes of the channel `cache`, in the order of their columns.
        like: a tensor of the dtype and on the device of the cache.

    Raises:
        Rejected: entries of another shape than those of the model, which peers of another base leave; or entries that
            exceed the range of the cache's dtype.
        Unsupported: the keys of this model cannot be moved.
    """
    ids, entries = list(prompt), []
    for notes in peers:
        check_fits(decoder, notes)
        if not len(notes):
            continue
        keys, values = (_tensor(array, like, notes.peer) for array in (notes.keys, notes.values))
        entries.append(Entries(len(ids), moved(decoder, keys, len(ids) - notes.first), values))
        ids += notes.tokens.tolist()
    if not entries:
        return Columns(ids, len(prompt), 0, ())
    return Columns([*ids, *suffix], len(prompt), len(suffix), tuple(entries))


def suffix_of(tokenizer: Any, prompt: Sequence[int], turns: Turns | None) -> list[int]:
    """The tokens of the suffix.

    Args:
        prompt: token ids.
        turns: of the chat template that has rendered the prompt; `None` for a plain prompt.
    """
    if turns is None:
        return list(prompt[-1:])
    ids: list[int] = tokenizer(turns.after_answer, add_special_tokens=False, verbose=False)["input_ids"]
    return ids or list(prompt[-1:])


def check_fits(decoder: Decoder, notes: Notes) -> None:
    """Raises Rejected unless the notes hold entries of this model's shape, for tokens that it has."""
    wanted = (decoder.n_layers, decoder.n_kv_heads, decoder.head_dim)
    if notes.keys is None:
        raise Rejected(f"the notes of {notes.peer!r} hold hidden states; expected key-value entries (channel 'cache')")
    found = (notes.keys.shape[0], notes.keys.shape[1], notes.keys.shape[3])
    if found != wanted:
        raise Rejected(
            f"the key-value entries of {notes.peer!r} have (layers, heads, width) {found}; expected {wanted}: "
            "its base is another one"
        )
    if (highest := int(notes.tokens.max(initial=0))) >= decoder.n_tokens:
        raise Rejected(
            f"the key-value entries of {notes.peer!r} are of the token {highest}; expected ids below "
            f"{decoder.n_tokens}: its base is another one"
        )


def moved(decoder: Decoder, keys: Tensor, distance: int) -> Tensor:
    """Keys (L, H, n, D) for positions that are `distance` further on; computed in float32.

    Raises:
        Unsupported: see `Decoder.rotation`.
    """
    import torch

    if not distance:
        return keys
    layers = []
    for layer, own in enumerate(keys.float()):
        cos, sin = decoder.rotation(layer, distance, keys.device)
        first, second = own.chunk(2, dim=-1)
        layers.append(own * cos + torch.cat((-second, first), dim=-1) * sin)
    return torch.stack(layers).to(keys.dtype)


def put(cache: Any, row: int, entries: Entries, *, padding: int = 0) -> None:
    """Overwrite columns of a row, which the cache has read, with entries.

    A layer with a sliding window has kept its last columns only; entries before them are out of reach for every later
    token. Tensors that need a gradient are copied first.

    Args:
        cache: a DynamicCache.
        row: of the batch.
        padding: columns before the first token of the row.
    """
    first = padding + entries.first
    for layer, keys, values in zip(cache.layers, entries.keys, entries.values, strict=True):
        forgotten = layer.get_seq_length() - layer.keys.shape[-2]
        start, end = max(0, first - forgotten), max(0, first + len(entries) - forgotten)
        if layer.keys.requires_grad or layer.values.requires_grad:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        n = end - start
        layer.keys[row, :, start:end] = keys[:, len(entries) - n :]
        layer.values[row, :, start:end] = values[:, len(entries) - n :]


def last_entries(cache: Any, row: int, n: int) -> tuple[Tensor, Tensor]:
    """Keys and values (L, H, n, D) of the last `n` columns of a row.

    Columns that a sliding window has left are zeros: no token after the last column can see them.
    """
    import torch

    keys, values = ([_last(getattr(layer, name), row, n) for layer in cache.layers] for name in ("keys", "values"))
    return torch.stack(keys), torch.stack(values)


def _last(tensor: Tensor, row: int, n: int) -> Tensor:
    kept = min(n, tensor.shape[2])
    own = tensor.new_zeros(tensor.shape[1], n, tensor.shape[3])
    own[:, n - kept :] = tensor[row, :, tensor.shape[2] - kept :]
    return own


def _tensor(array: Any, like: Tensor, peer: str) -> Tensor:
    import torch

    made = torch.tensor(array, dtype=like.dtype, device=like.device)
    if not bool(made.isfinite().all()):
        raise Rejected(f"the key-value entries of {peer!r} exceed the range of {like.dtype}, the dtype of the engine")
    return made
