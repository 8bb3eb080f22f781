"""What a primary reads: the notes of its peers, and their keys and values, of one request and of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PeerStates:
    """The notes of one peer before projection: its raw hidden states. T tokens, J depths.

    Attributes:
        states: (J, T, d_m) floats.
        spans: (T, 2) characters [start, end) of the user's text that each token is on; -1 where it is on none.
        ends: (T,) for text that the primary writes meanwhile (`reads: together`): the end of each token's characters
            in that text. A primary's token sees only notes that end where it ends, or before. None: text that was given
            before the answer, such as the prompt, which every token sees.
        order: (T,) where each token stands in its peer's answer: 1, 2, ...; 0 is the last token of the prompt, and
            tokens before it are negative. None: notes have no order.
        weight: () weight of the peer in the attention, 1 by default; may carry a gradient.
    """

    states: Tensor
    spans: Tensor | None = None
    ends: Tensor | None = None
    order: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """The notes of all peers of one request, as the Q interactions read them. n notes, H heads of width d_h.

    Attributes:
        keys, values: for each interaction (n, H, d_h).
        spans: (n, 2) characters of the user's text, -1 where there are none.
        ends: (n,) see `PeerStates.ends`; -1 for notes that every token sees.
        log_weights: (n,) logarithm of the weight of the note's peer.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    spans: Tensor
    ends: Tensor
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.spans)

    def select(self, notes: Tensor) -> Memory:
        """Only these notes: positions, or (n,) true for those that are kept."""
        return Memory(
            keys=tuple(each[notes] for each in self.keys),
            values=tuple(each[notes] for each in self.values),
            spans=self.spans[notes],
            ends=self.ends[notes],
            log_weights=self.log_weights[notes],
        )

    @classmethod
    def joined(cls, memories: Sequence[Memory]) -> Memory:
        """The notes of all, such as those of text that has become longer."""
        return cls(
            keys=tuple(map(torch.cat, zip(*(each.keys for each in memories), strict=True))),
            values=tuple(map(torch.cat, zip(*(each.values for each in memories), strict=True))),
            spans=torch.cat([each.spans for each in memories]),
            ends=torch.cat([each.ends for each in memories]),
            log_weights=torch.cat([each.log_weights for each in memories]),
        )


@dataclass(frozen=True, slots=True)
class Memories:
    """The memories of the rows of a batch, padded to the longest, n notes.

    Attributes:
        keys, values: for each interaction (rows, n, H, d_h).
        mask: (rows, n) true for notes, false for padding.
        spans, ends, log_weights: (rows, n, 2), (rows, n), (rows, n) as in `Memory`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    spans: Tensor
    ends: Tensor
    log_weights: Tensor

    @classmethod
    def stacked(cls, memories: Sequence[Memory | None]) -> Memories | None:
        """A row for each memory; None is a row without notes. None if no row has notes."""
        longest = max((len(each) for each in memories if each is not None), default=0)
        if longest == 0:
            return None
        first = next(each for each in memories if each is not None and len(each))
        counts = torch.tensor([0 if each is None else len(each) for each in memories], device=first.spans.device)

        def padded(parts: Sequence[Tensor | None], like: Tensor, fill: float = 0) -> Tensor:
            shape = (longest, *like.shape[1:])
            rows = [like.new_full(shape, fill) if part is None else _longer(part, longest, fill) for part in parts]
            return torch.stack(rows)

        def of(name: str, fill: float = 0) -> Tensor:
            return padded([None if m is None else getattr(m, name) for m in memories], getattr(first, name), fill)

        def per_interaction(name: str) -> tuple[Tensor, ...]:
            return tuple(
                padded([None if m is None else getattr(m, name)[q] for m in memories], like)
                for q, like in enumerate(getattr(first, name))
            )

        return cls(
            keys=per_interaction("keys"),
            values=per_interaction("values"),
            mask=torch.arange(longest, device=counts.device) < counts[:, None],
            spans=of("spans", -1),
            ends=of("ends", -1),
            log_weights=of("log_weights"),
        )

    def select(self, rows: Sequence[int]) -> Memories:
        """Only these rows, in this order."""
        index = torch.tensor(list(rows), device=self.mask.device)
        return Memories(
            keys=tuple(each[index] for each in self.keys),
            values=tuple(each[index] for each in self.values),
            mask=self.mask[index],
            spans=self.spans[index],
            ends=self.ends[index],
            log_weights=self.log_weights[index],
        )

    def overlaps(self, spans: Tensor) -> Tensor:
        """O (rows, T, n): whether the characters of a token and those of a note overlap; empty spans never do.

        Args:
            spans: (rows, T, 2) characters [start, end) of the user's text of each token of the primary; -1 for none.
        """
        start, end = spans[:, :, None, 0], spans[:, :, None, 1]
        note_start, note_end = self.spans[:, None, :, 0], self.spans[:, None, :, 1]
        real = (start >= 0) & (note_start >= 0) & (end > start) & (note_end > note_start)
        return real & (start < note_end) & (note_start < end)

    def visible(self, ends: Tensor | None) -> Tensor:
        """(rows, T or 1, n): which notes a token may read: those of given text, and those that end where it ends.

        Args:
            ends: (rows, T) the end of the characters of each token of the primary in the text that it writes; 0 for
                tokens of the prompt. None: the notes are all of given text.
        """
        if ends is None:
            return self.mask[:, None, :]
        return self.mask[:, None, :] & (self.ends[:, None, :] <= ends[:, :, None])


def _longer(tensor: Tensor, n: int, fill: float) -> Tensor:
    """The tensor with `fill` behind it, n entries long."""
    missing = n - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), fill)])
