"""Rows as padded tensors, and the losses of their answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


@dataclass(frozen=True, eq=False, slots=True)
class EncodedRow:
    """Token ids of a row.

    Attributes:
        prompt: of the rendered prompt, up to the start of the answer.
        answer: of the right answer, with its end token.
        spans: (len(prompt), 2) characters of the user's text of each token of the prompt; -1 for none.
    """

    prompt: list[int]
    answer: list[int]
    spans: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Rows padded on the right: B rows of T tokens, N answer tokens in all.

    Attributes:
        ids, mask: (B, T).
        predicts: (B, T) whether the next token belongs to the answer; N are true.
        targets: (N,) these next tokens.
        owners: (N,) their rows.
        spans: (B, T, 2).
    """

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor
    owners: Tensor
    spans: Tensor

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], device: torch.device | str = "cpu") -> Batch:
        """The last token of each answer is only a target, and is not read."""
        width = max(map(len, rows)) - 1
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        spans = torch.full((len(rows), width, 2), -1)
        for i, row in enumerate(rows):
            read = [*row.prompt, *row.answer[:-1]]
            ids[i, : len(read)] = torch.tensor(read)
            mask[i, : len(read)] = 1
            predicts[i, len(row.prompt) - 1 : len(read)] = True
            spans[i, : len(row.prompt)] = torch.from_numpy(row.spans.astype(np.int64))
        targets = torch.tensor([token for row in rows for token in row.answer])
        owners = torch.tensor([i for i, row in enumerate(rows) for _ in row.answer])
        return cls(*(each.to(device) for each in (ids, mask, predicts, targets, owners, spans)))


@dataclass(frozen=True, eq=False, slots=True)
class Predicted:
    """The answer tokens of rows: logits (N, V) in float32, the right tokens (N,), and the row of each (N,)."""

    logits: Tensor
    targets: Tensor
    owners: Tensor

    def loss(self) -> Tensor:
        """Mean cross-entropy of an answer token."""
        return cross_entropy(self.logits, self.targets)

    def of(self, rows: Sequence[int]) -> Tensor:
        """The logits of these rows, by position."""
        return self.logits[torch.isin(self.owners, torch.tensor(list(rows), device=self.owners.device))]

    def right(self, n_rows: int) -> Tensor:
        """(n_rows,) whether every answer token of a row is the most likely one: the greedy answer is the right one."""
        wrong = torch.zeros(n_rows, dtype=torch.long, device=self.targets.device)
        wrong.index_add_(0, self.owners, (self.logits.argmax(-1) != self.targets).long())
        return wrong == 0


def divergence(bare: Tensor, composed: Tensor) -> Tensor:
    """Mean KL(bare || composed) of N tokens, from their logits (N, V); no gradient flows into `bare`."""
    teacher = bare.detach().log_softmax(-1)
    return kl_div(composed.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
