"""Rows that read the notes of peers while the batch that they are in goes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.latent.interaction import Interactions
    from coe.engines.latent.memory import Memory
    from coe.engines.latent.prepared_reading import PreparedReading


@dataclass(frozen=True, eq=False, slots=True)
class RowNotes:
    """What one row reads.

    Attributes:
        interactions: of its composition, on the device of the model.
        memory: the notes, with at least one.
        spans: (n_prompt, 2) characters of the user's text of each token of the prompt; `None` if they are not read.
    """

    interactions: Interactions
    memory: Memory
    spans: NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class ReadingGroup:
    """The rows of a batch that read with the same interactions: one call for all of them at each of their layers.

    Attributes:
        reading: of their notes, stacked.
        positions: of the rows in the batch.
        rows: what each of them reads.
        index: the positions as a tensor; `None` if the batch has no other rows.
    """

    reading: PreparedReading
    positions: list[int]
    rows: list[RowNotes]
    index: Tensor | None

    @classmethod
    def of(cls, notes: Sequence[RowNotes | None]) -> list[ReadingGroup]:
        """The groups of a batch, given what each of its rows reads."""
        import torch

        from coe.engines.latent.memory import Memories
        from coe.engines.latent.prepared_reading import PreparedReading

        positions: dict[int, list[int]] = {}
        for position, each in enumerate(notes):
            if each is not None:
                positions.setdefault(id(each.interactions), []).append(position)
        groups = []
        for own in positions.values():
            rows = [each for each in (notes[position] for position in own) if each is not None]
            memories = Memories.stacked([row.memory for row in rows])
            if memories is not None:
                others = len(own) < len(notes)
                index = torch.tensor(own, device=memories.mask.device) if others else None
                groups.append(cls(PreparedReading(rows[0].interactions, memories), own, rows, index))
        return groups

    def read(self, q: int, hidden: Tensor, spans: Tensor | None) -> Tensor:
        """The hidden states (n_rows, n_tokens, d) of a batch, with what the rows of this group read added to them.

        What is added is computed in float32. Other rows stay as they are, bit for bit, and so do rows for which the
        interaction adds zero.

        Args:
            q: the interaction, from 0.
            spans: (n_own_rows, n_tokens, 2) of the group's rows.
        """
        own = hidden if self.index is None else hidden[self.index]
        own = self.reading.add(q, own, spans).to(hidden.dtype)
        return own if self.index is None else hidden.index_copy(0, self.index, own)

    def spans(self, begin: int, end: int, starts: Sequence[int], device: Any) -> Tensor | None:
        """Spans (n_own_rows, end - begin, 2) of the tokens in these columns of the batch; `None` if none has any.

        Args:
            starts: first column of each row of the batch.
        """
        import torch

        if not self.reading.interactions.shape.spans:
            return None
        shown = np.full((len(self.rows), end - begin, 2), -1, np.int32)
        for own, (position, row) in zip(shown, zip(self.positions, self.rows, strict=True), strict=True):
            if row.spans is None:
                continue
            first, last = max(begin, starts[position]), min(end, starts[position] + len(row.spans))
            if first < last:
                own[first - begin : last - begin] = row.spans[first - starts[position] : last - starts[position]]
        return torch.from_numpy(shown).to(device) if (shown >= 0).any() else None
