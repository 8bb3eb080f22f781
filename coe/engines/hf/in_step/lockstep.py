"""One answer that several members read in step: one token loop over the models of all of them.

    Lockstep(members, combine, name=name).answer(request)

Each member is a resident model, with an adapter or without, that reads the answer after its own prompt. Members on one
model are rows of one `Decoding`, with mixed adapters. A step runs as a job on the worker thread of each model
(`HFExpert.run`), so that other requests of these models go on, and as the answer is read: nothing runs ahead of its
reader, and closing the iterator ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coe.engines.hf.batch import BatchRow, Item
from coe.engines.hf.decoding import Decoding, choose
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.loop import padded, prepared
from coe.engines.hf.members import HFMember
from coe.errors import EngineError, Unsupported
from coe.types import Chunk, GenerateRequest, Usage

if TYPE_CHECKING:
    from torch import Tensor

Combine = Callable[["Tensor"], "Tensor"]
"""Scores of the next token by each member, (n_members, n_vocabulary) float32 -> the answer's, (n_vocabulary,)."""


class Lockstep:
    """Generates one answer from the scores of several members, which share one vocabulary.

    The first member leads: its tokenizer, chat template and end tokens are those of the answer.

    Args:
        members: the first one leads; at least one.
        combine: called on the worker thread of the leader's model.
        name: of the composed expert, for error messages.
    """

    def __init__(self, members: Sequence[HFMember], combine: Combine, *, name: str) -> None:
        self._members, self._combine, self._name = tuple(members), combine, name

    async def answer(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated; see `Expert.generate`. Usage counts the tokens of all members.

        Raises:
            Unsupported: the request wants something else than text, or scores of its prompt.
            OutOfMemory: the key-value caches do not fit.
        """
        check_text(request, self._name)
        rows = await self._rows(request)
        groups = await _groups(self._members, rows)
        lead, leader = groups[0], rows[0]
        await _all(group.begin() for group in groups)
        while not await _all(group.read() for group in groups):
            pass
        leader.begin()
        while True:
            for item in leader.drain():
                yield self._item(item, rows)
            if leader.done:
                return
            if len(groups) > 1:
                await _all(group.step() for group in groups)
            await lead.run(lambda model: self._advance(groups, leader))

    async def _rows(self, request: GenerateRequest) -> list[BatchRow]:
        """A row for each member; the first one chooses the tokens, as many as fit the contexts of all."""
        rows = await asyncio.gather(
            *(
                member.expert.prepare(request, member.adapter, chooses=position == 0)
                for position, member in enumerate(self._members)
            )
        )
        rows[0].request = replace(rows[0].request, max_tokens=min(row.max_tokens for row in rows))
        return rows

    def _advance(self, groups: Sequence[_Group], leader: BatchRow) -> None:
        """Choose the next token of the answer, which all members read next; a single group first reads the last."""
        if len(groups) == 1:
            groups[0].decode()
        scores = self._combine(_gathered(groups, len(self._members)))[None]
        if not bool(scores.amax().isfinite()):
            leader.fail(EngineError(f"the scores of the next token of {self._name!r} are not finite"))
            return
        lead = groups[0]
        ids = lead.decoding.input_ids[lead.members.index(0)][None]
        tokens, scored = choose([leader], ids, scores)
        token = int(tokens[0])
        leader.advance(token, scored[0])
        for group in groups:
            group.next = token

    def _item(self, item: Item, rows: Sequence[BatchRow]) -> Chunk:
        if isinstance(item, Exception):
            raise item
        if item.usage is None:
            return item
        n_prompt, n_generated = sum(len(row.prompt_ids) for row in rows), item.usage.completion_tokens
        return replace(item, usage=Usage(n_prompt, n_generated * len(rows)))


class _Group:
    """The members on one model: rows of one `Decoding`.

    Attributes:
        members: their positions among all members.
        next: the token to read in the next step; None before the first.
    """

    def __init__(self, expert: HFExpert, members: Sequence[int], rows: Sequence[BatchRow]) -> None:
        self._expert, self.members, self._rows = expert, list(members), list(rows)
        self._adapters = [row.adapter for row in rows]
        self._decoding: Decoding | None = None
        self._is_read = False
        self.next: int | None = None

    @property
    def decoding(self) -> Decoding:
        """The rows with their cache, after `begin`."""
        assert self._decoding is not None
        return self._decoding

    async def run(self, call: Callable[[Any], Any]) -> Any:
        """A job on the worker thread of the model, with the adapters of the rows."""
        return await asyncio.wrap_future(self._expert.run(call, self._adapters))

    async def begin(self) -> None:
        """Prepare the prompts."""
        await self.run(self._begin)

    async def read(self) -> bool:
        """Read the next part of the prompts, as long as other requests may wait; whether they are read."""
        n_columns = max(1, self._expert.n_prefill // len(self._rows))
        if not self._is_read:
            self._is_read = await self.run(lambda model: self.decoding.prefill(n_columns))
        return self._is_read

    async def step(self) -> None:
        """Read the next token."""
        await self.run(lambda model: self.decode())

    def decode(self) -> None:
        """Read the next token, on the worker thread. The first scores come from the prompts."""
        if self.next is not None:
            self.decoding.feed(self.next)
            self.decoding.decode()

    def _begin(self, model: Any) -> None:
        loaded = self._expert.loaded
        width = max(len(row.prompt_ids) for row in self._rows) + max(row.max_tokens for row in self._rows)
        self._expert.require_cache(len(self._rows) * width)
        ids, inputs = prepared(model, *padded(self._rows, min(loaded.eos, default=0), model.device))
        self._decoding = Decoding(model, self._rows, ids, inputs)


async def _groups(members: Sequence[HFMember], rows: Sequence[BatchRow]) -> list[_Group]:
    """One for each model, or more where its adapters cannot be mixed; that of the first member first."""
    by_model: dict[int, list[int]] = {}
    for position, member in enumerate(members):
        by_model.setdefault(id(member.expert), []).append(position)
    groups = []
    for positions in by_model.values():
        expert = members[positions[0]].expert
        batches = await asyncio.wrap_future(expert.batches([members[i].adapter for i in positions]))
        groups += [_Group(expert, [positions[i] for i in b], [rows[positions[i]] for i in b]) for b in batches]
    return sorted(groups, key=lambda group: group.members[0])


async def _all(steps: Iterable[Any]) -> bool:
    """Run steps of several models side by side; whether all results are true."""
    return all(await asyncio.gather(*steps))


def _gathered(groups: Sequence[_Group], n_members: int) -> Tensor:
    """The scores of all members, (n_members, n_vocabulary), on the device of the first.

    Models of one tokenizer may pad their vocabularies to different sizes: ids that one lacks are no tokens.
    """
    first = groups[0].decoding.scores
    scores = first.new_full((n_members, first.shape[-1]), float("-inf"))
    for group in groups:
        own = group.decoding.scores
        n = min(own.shape[-1], scores.shape[-1])
        scores[group.members, :n] = own[:, :n].to(scores.device)
    return scores


def check_text(request: GenerateRequest, name: str) -> None:
    """Raises Unsupported unless the request wants text, without scores of its prompt."""
    if request.wants != "text":
        raise Unsupported(f"{name!r} is composed of several experts, which return text, not {request.wants!r}")
    if request.prompt_logprobs is not None:
        raise Unsupported(f"{name!r} is composed of several experts: it returns no log-probabilities of prompts")
