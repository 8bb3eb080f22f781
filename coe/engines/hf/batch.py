"""The state of each request in a batch, and the way of its text to its reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from coe.chunks import merged
from coe.engines.answer import AnswerStream
from coe.engines.base import Adapter
from coe.engines.constrained.matcher import Matcher
from coe.engines.hf.lora.mixture import RowSlot
from coe.engines.hf.notes.capture import Capture
from coe.engines.hf.notes.row_reading import RowNotes
from coe.engines.hf.sampling import Sampling
from coe.engines.latent.cache_channel import Columns
from coe.engines.logprobs import Scored, TokenTexts, packed
from coe.errors import CoeError, EngineError
from coe.types import Chunk, FinishReason, GenerateRequest, TokenLogprob, Usage

if TYPE_CHECKING:
    from torch import Tensor

Item = Chunk | Exception
COALESCE_S: Final = 0.025
"""Least interval between pieces of text after the first: each costs a switch of threads, then a network message."""
_NO_CALL: Final = (
    "the model answered without a valid call of the tools, which tool_choice demands: ask again, send "
    'tool_choice "auto", or ask an expert that calls tools'
)


class RowState(Protocol):
    """What an expert that is composed of others keeps for one row: it stays with the row, whatever batch that is in.

    Rows join a batch and leave it between any two tokens, so positions in a batch mean nothing to it.
    """

    def read(self, hidden: Tensor) -> None:
        """Called by the worker thread after each forward of the row, before its next token is chosen.

        Raised errors end this row alone.

        Args:
            hidden: (n_hidden,) of the row's last token: what the head of the model reads.
        """


@dataclass(eq=False, slots=True)
class BatchRow:
    """One request in a batch. The event loop creates and reads it; the worker thread advances it.

    Attributes:
        prompt_ids: token ids of the rendered prompt; for a row with `columns`, the ids of these.
        eos: token ids that end the answer.
        slot: the name of the adapter on the base, or the mixture, once loaded.
        cancelled: set by the reader; the row ends at the next token.
        processors: change the scores before a token is chosen (`coe.engines.hf.sampling.processors`).
        matcher: which tokens may come next, for an answer in a required format.
        state: sees the hidden states of the row.
        capture: keeps the notes that the row leaves. notes: what it reads of its peers' hidden states. columns: where
            it reads its peers' key-value entries.
        remarks: for the reader of the answer (`Chunk.notes`). peers: whose notes it reads.
        arrived: when the row was put into the queue.
        echo: text before the answer. texts: of single tokens, for a row with log-probabilities.
    """

    request: GenerateRequest
    prompt_ids: list[int]
    adapter: Adapter | None
    eos: frozenset[int]
    text: AnswerStream
    sampling: Sampling | None
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    clock: Callable[[], float] = time.monotonic
    processors: Any = None
    matcher: Matcher | None = None
    state: RowState | None = None
    capture: Capture | None = None
    notes: RowNotes | None = None
    columns: Columns | None = None
    remarks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    arrived: float = 0.0
    echo: str = ""
    texts: TokenTexts | None = None
    slot: RowSlot = None
    cancelled: bool = False
    done: bool = False
    n_generated: int = 0
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _value: bytes | None = None
    _ending: tuple[FinishReason, Chunk | None] | None = None
    _outbox: list[Item] = field(default_factory=list)
    _shown_at: float = float("-inf")

    @property
    def max_tokens(self) -> int:
        """Most tokens of the answer; set before the row is created."""
        assert self.request.max_tokens is not None
        if self.capture is not None and not self.capture.wanted.answer:
            return 0
        return self.request.max_tokens

    @property
    def n_top(self) -> int | None:
        """Number of most likely tokens to find beside each generated one; `None` if no log-probability is wanted."""
        return self.request.logprobs

    @property
    def n_prompt_top(self) -> int | None:
        """The same for the tokens of the prompt."""
        wanted = self.request.prompt_logprobs
        return 0 if wanted is None and self.request.wants == "scores" else wanted

    def begin(self, prompt: Sequence[Scored] = ()) -> None:
        """The prompt is processed: add its text and scores, if wanted. A row without new tokens ends here."""
        if self.request.wants == "scores":
            self._value = packed(prompt)
        texts = self.texts if self.request.prompt_logprobs is not None else None
        prompt = prompt if self.columns is None else prompt[: self.columns.n_prompt]
        logprobs = texts.logprobs(prompt) if texts else ()
        if self.echo or logprobs:
            self._outbox.append(Chunk(self.echo, prompt_logprobs=logprobs))
        if self.max_tokens == 0:
            self._finish("length")

    def show(self, hidden: Tensor) -> None:
        """Pass the row's hidden state (n_hidden,) to what follows it."""
        assert self.state is not None
        try:
            self.state.read(hidden)
        except Exception as error:  # of another one's code: other rows go on
            self.fail(error if isinstance(error, CoeError) else EngineError(f"{type(error).__name__}: {error}"))

    def advance(self, token: int, scored: Scored | None = None) -> None:
        """Add the next token; decides end of text, stop strings, limits and cancellation."""
        try:
            self._advance(token, scored)
        except CoeError as error:  # of the response template; other rows go on
            self.fail(error)

    def _advance(self, token: int, scored: Scored | None) -> None:
        self.n_generated += 1
        if self.cancelled:
            return self._finish("cancelled")
        if self._ending is not None:  # the last token has been read; what would follow is no part of the answer
            return self._finish(*self._ending)
        if self.matcher is not None and (error := self.matcher.advance(token, self.eos)) is not None:
            return self.fail(error)
        if scored is not None and self.texts is not None:
            first = self.n_generated == 1 and bool(self.request.messages)
            self._logprobs.append(self.texts.logprob(scored, first=first))
        if token in self.eos:
            self.text.push_end(token)
            return self._finish("stop")
        self.text.push(token)
        if self.capture is not None:
            self.capture.tokens.append(token)
        due = self.clock() - self._shown_at >= COALESCE_S
        may_stop = self.n_generated >= self.request.sampling.min_tokens
        piece = self.text.take(search=may_stop) if due or self.text.watches else None
        if self.text.stopped or (self.matcher is not None and self.matcher.ended):
            return self._end("stop", piece)
        if self.n_generated >= self.max_tokens:
            return self._end("length", piece)
        if piece is not None and not piece.is_empty:
            self._outbox.append(replace(piece, logprobs=self._take_logprobs()))
            self._shown_at = self.clock()
        return None

    def fail(self, error: Exception) -> None:
        """End the row with an error."""
        if not self.done:
            self.done = True
            self._outbox.append(error)

    def _end(self, reason: FinishReason, piece: Chunk | None) -> None:
        """The answer is complete; a row that leaves notes reads its last token, too."""
        if self.capture is None:
            return self._finish(reason, piece)
        self._ending, self.matcher = (reason, piece), None
        return None

    def _finish(self, reason: FinishReason, piece: Chunk | None = None) -> None:
        end = self.text.take(last=True)
        answer = end if piece is None else merged(piece, end)
        if reason == "length" and self.text.stopped:
            reason = "stop"
        if reason == "stop" and self.text.lacks_call:
            return self.fail(EngineError(_NO_CALL))
        self.done = True
        if reason == "stop" and self.text.n_calls:
            reason = "tool_calls"
        if self.capture is not None and reason != "cancelled":
            self._value = self.capture.packed()
        last = replace(
            answer,
            finish_reason=reason,
            usage=self._usage(),
            value=self._value,
            logprobs=self._take_logprobs(),
            notes=self.remarks,
        )
        self._outbox.append(last)
        return None

    def _usage(self) -> Usage:
        """The tokens that the model has read or written. Entries of peers are counted where they were written."""
        n_entries = sum(map(len, self.columns.entries)) if self.columns is not None else 0
        return Usage(len(self.prompt_ids) - n_entries, self.n_generated - (self._ending is not None))

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of the tokens since the last chunk."""
        taken, self._logprobs = tuple(self._logprobs), []
        return taken

    def drain(self) -> list[Item]:
        """Remove and return what is ready for the reader."""
        items, self._outbox = self._outbox, []
        return items


def deliver(rows: Iterable[BatchRow]) -> None:
    """Pass what is ready to the readers, with one callback per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[BatchRow, list[Item]]]] = {}
    for row in rows:
        if items := row.drain():
            by_loop.setdefault(row.loop, []).append((row, items))
    for loop, ready in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, ready)
        except RuntimeError:  # the loop is closed: there is no reader any more
            for row, _ in ready:
                row.cancelled = True


def _put(ready: Sequence[tuple[BatchRow, Sequence[Item]]]) -> None:
    for row, items in ready:
        for item in items:
            row.queue.put_nowait(item)
