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
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from coe.engines.hf.in_step.reading_peer import ReadingPeer
from coe.engines.hf.in_step.writing_primary import WritingPrimary
from coe.engines.latent.memory import Memory
from coe.errors import DeadlineExceeded
from coe.types import Chunk, Usage

STEP_S: Final = 60.0
"""Seconds for a step of a peer, its prompt included; a slower one is left out of the rest of the answer."""


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
