"""Peers that read an answer while another model writes it: the loop of a Mixture of Thoughts (arXiv 2509.21164).

For every token of the primary:

    peers      read the text as it is now, each after its own prompt and with its own tokenizer, and leave their hidden
               states at some layers as notes
    primary    reads its last token; the interactions after some of its layers read all notes

Information flows from the peers to the primary only, so there is nothing to synchronise inside a forward: peers read
the new text first, side by side, then the primary takes its step. A note is of text that the primary has written
already: no token sees what comes after it.

A longer text may have other last tokens: "th" is one token, and one of other characters in "the". A peer keeps the
tokens that both texts begin with, drops the states of the others, and reads the new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Adapter
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.loop import padded, prepared
from coe.engines.hf.members import HFMember
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.growing_text import GrowingText, n_common
from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.errors import ContextLengthExceeded, DeadlineExceeded
from coe.types import Chunk, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.latent.interaction import Interactions

Spans = Sequence[tuple[int, int]]
STEP_S: Final = 60.0
"""Seconds for a step of a peer, its prompt included; a slower one is left out of the rest of the answer."""


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """What a member reads before the answer.

    Attributes:
        row: its tokens and limits.
        spans: (n_prompt,) characters of the user's text of each token, (-1, -1) for none.
    """

    row: BatchRow
    spans: Spans


class ReadingPeer:
    """A peer of one request: its key-value cache, and the notes of all tokens that it has read.

    Args:
        member: the resident model. prompt: what it reads first.
        layers: (J,) decoder layers whose outputs are notes, counted from 1.
        interactions: of the primary; they turn states into notes.
        n_user: characters of the user's text; those of the answer follow in the spans.
        weight: w_m of its notes in the attention.
        among: adapters of the other members on its model, so that each step does not prepare the model again.
    """

    def __init__(
        self,
        member: HFMember,
        prompt: Prompt,
        layers: Sequence[int],
        interactions: Interactions,
        *,
        n_user: int,
        weight: float = 1.0,
        among: Sequence[Adapter | None] = (),
    ) -> None:
        self.name, self._member, self._prompt = member.name, member, prompt
        self._layers, self._interactions, self._among = tuple(layers), interactions, among
        self._n_user, self._weight = n_user, weight
        self._answer = GrowingText(member.expert.loaded.tokenizer)
        self._decoder = Decoder.of(member.expert.loaded.model, expert=member.name)
        self._cache: Any = None
        self._memory: Memory | None = None
        self._token_of: Tensor | None = None  # (n_notes,) which token each note is of

    @property
    def memory(self) -> Memory:
        """The notes of prompt and answer so far, after `begin`."""
        assert self._memory is not None
        return self._memory

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer, as this peer reads it."""
        return len(self._answer.tokens)

    @property
    def n_prompt(self) -> int:
        """Tokens of its prompt."""
        return len(self._prompt.row.prompt_ids)

    async def begin(self) -> None:
        """Read the prompt, in parts between which other requests go on."""
        row, size = self._prompt.row, self._member.expert.n_prefill
        self._member.expert.require_cache(len(row.prompt_ids) + row.max_tokens)
        for start in range(0, self.n_prompt, size):
            ids, spans = row.prompt_ids[start : start + size], self._prompt.spans[start : start + size]
            await self._run(partial(self._read, ids=ids, spans=spans, first=start))

    async def read(self, text: str) -> None:
        """Read the answer as it is now.

        Raises:
            ContextLengthExceeded: prompt and answer do not fit its context.
        """
        await self._run(partial(self._follow, text=text))

    async def _run(self, call: Callable[[Any], None]) -> None:
        member = self._member
        await asyncio.wrap_future(member.expert.run(call, [member.adapter], among=self._among))

    # On the worker thread

    def _follow(self, model: Any, *, text: str) -> None:
        tokenizer, limit = self._member.expert.loaded.tokenizer, self._member.context_length
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.n_prompt + len(ids) > limit:
            raise ContextLengthExceeded(
                self.name, prompt_tokens=self.n_prompt, max_tokens=len(ids), context_length=limit
            )
        same = n_common(self._answer.tokens, ids)
        self._drop(same)
        for token in ids[same:]:
            self._answer.push(token)
        if len(ids) > same:
            spans = [(self._n_user + start, self._n_user + end) for start, end in self._answer.spans(same)]
            self._read(model, ids=ids[same:], spans=spans, first=self.n_prompt + same)

    def _drop(self, n_kept: int) -> None:
        """Forget what was read after the first tokens of the answer."""
        if n_kept == self.n_tokens:
            return
        self._answer.crop(n_kept)
        n_read = self.n_prompt + n_kept
        self._cache.crop(n_read)
        assert self._memory is not None and self._token_of is not None
        kept = self._token_of < n_read
        self._memory, self._token_of = self._memory.select(kept), self._token_of[kept]

    def _read(self, model: Any, *, ids: Sequence[int], spans: Spans, first: int) -> None:
        """Read tokens, of which `first` others have been read before."""
        import torch

        states = self._states(model, torch.tensor([list(ids)], device=model.device))
        weight = None if self._weight == 1 else torch.tensor(self._weight)
        notes = PeerStates(states, spans=torch.tensor(list(spans)).reshape(-1, 2), weight=weight)
        new = self._interactions.memory({self.name: notes})
        token_of = torch.arange(first, first + len(ids), device=new.spans.device)
        token_of = token_of.repeat(len(new) // len(ids))
        if self._memory is not None and self._token_of is not None:
            new, token_of = Memory.joined([self._memory, new]), torch.cat([self._token_of, token_of])
        self._memory, self._token_of = new, token_of

    def _states(self, model: Any, ids: Tensor) -> Tensor:
        """(J, n, d) states of the next tokens (1, n), which the cache has from now on."""
        import torch
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache()  # without windows, which could not be cropped; masks keep to them
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in self._layers:
                keep = partial(_keep, found, layer)
                stack.callback(self._decoder.at(layer).register_forward_hook(keep).remove)
            body = getattr(model, model.base_model_prefix)  # no scores are needed
            body(input_ids=ids, past_key_values=self._cache, use_cache=True)
        return torch.stack([found[layer][0] for layer in self._layers])


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


class Together:
    """One answer of a primary whose peers read it while it is written.

    Args:
        primary: writes. peers: whose notes it reads.
        describe: the text of a peer's error, for the reader of the answer.
        deadline_s: seconds for each step of a peer; one that takes longer is left out.
    """

    def __init__(
        self,
        primary: WritingPrimary,
        peers: Sequence[ReadingPeer],
        describe: Callable[[str, Exception], str],
        deadline_s: float = STEP_S,
    ) -> None:
        self._primary, self._peers = primary, list(peers)
        self._describe, self._deadline_s = describe, deadline_s
        self._all = tuple(peers)
        self.notes: list[str] = []

    async def answer(self) -> AsyncIterator[Chunk]:
        """Yield the answer; see `Expert.generate`. A peer that fails is left out from then on, and named in a note.

        Usage counts the tokens of all members.
        """
        primary = self._primary
        await self._read(ReadingPeer.begin)
        await primary.begin(self._memory())
        while True:
            while not primary.row.queue.empty():
                item = primary.row.queue.get_nowait()
                if isinstance(item, Exception):
                    raise item
                yield self._counted(item)
                if item.finish_reason is not None:
                    return
            await self._read(partial(ReadingPeer.read, text=primary.text))
            await primary.step(self._memory())

    async def _read(self, step: Callable[[ReadingPeer], Any]) -> None:
        """A step of all peers, side by side."""
        peers = self._peers
        ended = await asyncio.gather(*(self._in_time(peer, step(peer)) for peer in peers), return_exceptions=True)
        for peer, outcome in zip(peers, ended, strict=True):
            if isinstance(outcome, Exception):
                self.notes.append(self._describe(peer.name, outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
        self._peers = [peer for peer, outcome in zip(peers, ended, strict=True) if outcome is None]

    async def _in_time(self, peer: ReadingPeer, step: Any) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await step
        except TimeoutError:
            raise DeadlineExceeded(f"{peer.name!r} took longer than {self._deadline_s:g} s for a step") from None

    def _memory(self) -> Memory | None:
        return Memory.joined([peer.memory for peer in self._peers]) if self._peers else None

    def _counted(self, chunk: Chunk) -> Chunk:
        if chunk.usage is None:
            return chunk
        n_prompt, n_read = (sum(getattr(peer, name) for peer in self._all) for name in ("n_prompt", "n_tokens"))
        own = chunk.usage
        usage = Usage(own.prompt_tokens + n_prompt, own.completion_tokens + n_read)
        return replace(chunk, usage=usage, notes=(*chunk.notes, *self.notes))


def _keep(found: dict[int, Tensor], layer: int, _module: Any, _inputs: Any, output: Tensor) -> None:
    found[layer] = output


def _add(
    interactions: Interactions, q: int, memories: Memories, spans: Tensor, _module: Any, _inputs: Any, output: Tensor
) -> Tensor:
    """A forward hook: the hidden states with what interaction `q` reads added to them, bit for bit if that is zero."""
    update = interactions.read(q, output, memories, spans=spans)
    return (output.float() + update).to(output.dtype)
