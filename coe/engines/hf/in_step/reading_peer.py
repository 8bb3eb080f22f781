"""A peer that reads an answer while another model writes it, and leaves notes of all that it has read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from coe.engines.base import Adapter
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.members import HFMember
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.growing_text import GrowingText, n_common
from coe.engines.latent.memory import Memory, PeerStates
from coe.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.latent.interaction import Interactions

Spans = Sequence[tuple[int, int]]


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
        self._cache.crop(n_kept - self.n_tokens)
        self._answer.crop(n_kept)
        n_read = self.n_prompt + n_kept
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
        body = getattr(model, model.base_model_prefix)  # no scores are needed
        with self._decoder.states(self._layers) as found:
            body(input_ids=ids, past_key_values=self._cache, use_cache=True)
        return torch.stack([found[layer][0] for layer in self._layers])
