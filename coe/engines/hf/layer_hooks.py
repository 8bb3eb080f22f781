"""Hooks on the layers of a model, for the rows of a batch that leave notes or read those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coe.engines.hf.batch import BatchRow
from coe.engines.hf.notes.row_reading import ReadingGroup
from coe.engines.latent.decoders import Decoder

if TYPE_CHECKING:
    from torch import Tensor


class LayerHooks:
    """What rows of one batch see of its forwards, and add to them. Made again whenever rows join or leave.

    A batch without such rows has no hooks. Notes are stacked on first use, which may fail for lack of memory.

    Args:
        model: a transformers causal language model.
        rows: of the batch.
    """

    def __init__(self, model: Any, rows: Sequence[BatchRow]) -> None:
        self._leaving = [(position, row) for position, row in enumerate(rows) if row.capture is not None]
        self._notes = [row.notes for row in rows]
        self._groups: list[ReadingGroup] | None = None
        self._decoder = Decoder.of(model) if self._leaving or any(self._notes) else None

    def stack(self) -> list[ReadingGroup]:
        """The rows that read, by what they read with; their notes are stacked now, unless they are."""
        if self._groups is None:
            self._groups = ReadingGroup.of(self._notes)
        return self._groups

    @contextmanager
    def around(self, begin: int, end: int, starts: Sequence[int]) -> Iterator[None]:
        """Within the block, for one forward that reads the columns [begin, end) of the batch.

        Args:
            starts: (n_rows,) first column of each row that is no padding.
        """
        if self._decoder is None:
            yield
            return
        with ExitStack() as stack:
            for group in self.stack():
                spans: dict[Any, Tensor | None] = {}
                for q, layer in enumerate(group.reading.layers):
                    read = partial(_read, group, q, spans, begin, end, starts)
                    stack.callback(self._decoder.at(layer).register_forward_hook(read).remove)
            for layer in sorted({layer for _, row in self._leaving if row.capture for layer in row.capture.layers}):
                see = partial(self._see, layer, begin, starts)
                stack.callback(self._decoder.at(layer).register_forward_hook(see).remove)
            yield

    def _see(self, layer: int, begin: int, starts: Sequence[int], _module: Any, _inputs: Any, output: Tensor) -> None:
        for position, row in self._leaving:
            if row.capture is None or row.done or layer not in row.capture.layers:
                continue
            first = max(begin, starts[position] + row.capture.first)
            if first - begin < output.shape[1]:
                row.capture.see(layer, output[position, first - begin :])


def _read(
    group: ReadingGroup,
    q: int,
    spans: dict[Any, Tensor | None],
    begin: int,
    end: int,
    starts: Sequence[int],
    _module: Any,
    _inputs: Any,
    output: Tensor,
) -> Tensor:
    """A forward hook of a layer. `spans`: of this forward, the same at every layer."""
    if output.device not in spans:
        spans[output.device] = group.spans(begin, end, starts, output.device)
    return group.read(q, output, spans[output.device])
