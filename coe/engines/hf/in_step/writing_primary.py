"""The primary of a composition whose peers read its answer while it is written: it reads their notes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coe.engines.base import Adapter
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.in_step.reading_peer import Prompt, Spans
from coe.engines.hf.loop import padded, prepared
from coe.engines.hf.members import HFMember
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.growing_text import GrowingText
from coe.engines.latent.memory import Memories, Memory

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.latent.interaction import Interactions


class WritingPrimary:
    """The primary of one request: a batch of one row, whose layers read notes.

    Args:
        member: the resident model. prompt: its own rendering.
        interactions: of this primary.
        n_user: characters of the user's text.
        among: adapters of the other members on its model.
    """

    def __init__(
        self,
        member: HFMember,
        prompt: Prompt,
        interactions: Interactions,
        *,
        n_user: int,
        among: Sequence[Adapter | None] = (),
    ) -> None:
        self._member, self._prompt, self._interactions, self._among = member, prompt, interactions, among
        self._n_user = n_user
        self._decoder = Decoder.of(member.expert.loaded.model, expert=member.name)
        self._decoding: Decoding | None = None
        self._answer = GrowingText(member.expert.loaded.tokenizer)

    @property
    def row(self) -> BatchRow:
        """The request."""
        return self._prompt.row

    @property
    def text(self) -> str:
        """Of the answer, up to its last complete character."""
        return self._answer.text

    async def begin(self, memory: Memory | None) -> None:
        """Read the prompt, with the notes of the peers' prompts, and choose the first token."""
        self._member.expert.require_cache(len(self.row.prompt_ids) + self.row.max_tokens)
        await self._run(self._prepare)
        start, size, width = 0, self._member.expert.n_prefill, len(self.row.prompt_ids)
        while start < width:
            spans = self._prompt.spans[start : start + size]
            await self._run(partial(self._prefill, memory=memory, spans=spans))
            start += size

    async def step(self, memory: Memory | None) -> None:
        """Read the last token, with the notes, and choose the next one."""
        await self._run(partial(self._step, memory=memory))

    async def _run(self, call: Callable[[Any], None]) -> None:
        member = self._member
        await asyncio.wrap_future(member.expert.run(call, [member.adapter], among=self._among))

    # On the worker thread

    @property
    def decoding(self) -> Decoding:
        """The row with its cache, after `begin`."""
        assert self._decoding is not None
        return self._decoding

    def _prepare(self, model: Any) -> None:
        pad = min(self._member.expert.loaded.eos, default=0)
        ids, inputs = prepared(model, *padded([self.row], pad, model.device))
        self._decoding = Decoding(model, [self.row], ids, inputs)

    def _prefill(self, model: Any, *, memory: Memory | None, spans: Spans) -> None:
        with self._with_notes(memory, spans):
            is_read = self.decoding.prefill(len(spans))
        if is_read:
            self._advance()

    def _step(self, model: Any, *, memory: Memory | None) -> None:
        spans = [(self._n_user + start, self._n_user + end) for start, end in self._answer.spans(-1)]
        with self._with_notes(memory, spans):
            self.decoding.decode()
        self._advance()

    def _advance(self) -> None:
        self.decoding.advance()
        if self.row.n_generated > len(self._answer.tokens) and not self.row.done:
            self._answer.push(int(self.decoding.input_ids[0, -1]))

    @contextmanager
    def _with_notes(self, memory: Memory | None, spans: Spans) -> Iterator[None]:
        """Within the block, tokens with these spans read the notes, all of which are of text before them."""
        import torch

        memories = Memories.stacked([memory])
        if memories is None:
            yield
            return
        of_tokens = torch.tensor([list(spans)], device=memories.spans.device)
        with ExitStack() as stack:
            for q, layer in enumerate(self._interactions.where()):
                add = partial(_add, self._interactions, q, memories, of_tokens)
                stack.callback(self._decoder.at(layer).register_forward_hook(add).remove)
            yield


def _add(
    interactions: Interactions, q: int, memories: Memories, spans: Tensor, _module: Any, _inputs: Any, output: Tensor
) -> Tensor:
    """A forward hook: the hidden states with what interaction `q` reads added to them, bit for bit if that is zero."""
    update = interactions.read(q, output, memories, spans=spans)
    return (output.float() + update).to(output.dtype)
