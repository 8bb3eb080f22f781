"""The requests of one model: the queue, the choice of the next batch, and the state of each row.

A batch is static while it runs: no row joins it. The scheduler chooses between experts, and this queue within one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from coe.chunks import merged
from coe.engines.base import Adapter
from coe.engines.hf.answer import AnswerStream
from coe.engines.hf.constrained.matcher import Matcher
from coe.engines.hf.logprobs import Scored, TokenTexts, packed
from coe.engines.hf.sampling import Sampling
from coe.errors import CoeError, EngineError
from coe.types import Chunk, FinishReason, GenerateRequest, TokenLogprob, Usage

Item = Chunk | Exception
COALESCE_S: Final = 0.025
"""Least interval between pieces of text after the first: each costs a switch of threads, then a network message."""
_NO_CALL: Final = (
    "the model answered without a valid call of the tools, which tool_choice demands: ask again, send "
    'tool_choice "auto", or ask an expert that calls tools'
)


@dataclass(eq=False, slots=True)
class BatchRow:
    """One request in a batch. The event loop creates and reads it; the worker thread advances it.

    Attributes:
        prompt_ids: token ids of the rendered prompt.
        eos: token ids that end the answer.
        slot: peft's name of the adapter, once loaded.
        cancelled: set by the reader; the row ends at the next token.
        processors: change the scores before a token is chosen (`coe.engines.hf.sampling.processors`).
        matcher: which tokens may come next, for an answer in a required format.
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
    echo: str = ""
    texts: TokenTexts | None = None
    slot: str | None = None
    cancelled: bool = False
    done: bool = False
    n_generated: int = 0
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _value: bytes | None = None
    _outbox: list[Item] = field(default_factory=list)
    _shown_at: float = float("-inf")

    @property
    def max_tokens(self) -> int:
        """Most tokens of the answer; set before the row is created."""
        assert self.request.max_tokens is not None
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
        logprobs = texts.logprobs(prompt) if texts else ()
        if self.echo or logprobs:
            self._outbox.append(Chunk(self.echo, prompt_logprobs=logprobs))
        if self.max_tokens == 0:
            self._finish("length")

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
        if self.matcher is not None and (error := self.matcher.advance(token, self.eos)) is not None:
            return self.fail(error)
        if scored is not None and self.texts is not None:
            first = self.n_generated == 1 and bool(self.request.messages)
            self._logprobs.append(self.texts.logprob(scored, first=first))
        if token in self.eos:
            self.text.push_end(token)
            return self._finish("stop")
        self.text.push(token)
        due = self.clock() - self._shown_at >= COALESCE_S
        may_stop = self.n_generated >= self.request.sampling.min_tokens
        piece = self.text.take(search=may_stop) if due or self.text.watches else None
        if self.text.stopped or (self.matcher is not None and self.matcher.ended):
            return self._finish("stop", piece)
        if self.n_generated >= self.max_tokens:
            return self._finish("length", piece)
        if piece is not None and not piece.is_empty:
            self._outbox.append(replace(piece, logprobs=self._take_logprobs()))
            self._shown_at = self.clock()
        return None

    def fail(self, error: Exception) -> None:
        """End the row with an error."""
        if not self.done:
            self.done = True
            self._outbox.append(error)

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
        usage = Usage(len(self.prompt_ids), self.n_generated)
        last = replace(answer, finish_reason=reason, usage=usage, value=self._value, logprobs=self._take_logprobs())
        self._outbox.append(last)
        return None

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


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch.

    Attributes:
        rows: most rows.
        adapters: most different adapters.
        tokens: most tokens in the key-value cache (rows x longest prompt and answer); `None` is no limit.
        positions: most padded prompt plus answer, the model's context.
        scoring: tokens in the key-value cache that take as much memory as scoring the prompts of a batch.
        entries: most log-probabilities of prompts; the objects that hold them take some 100 bytes each.
        padding: a batch's padded prompts may have this many times the tokens of its prompts...
        short: ...unless all its prompts are at most this long, when padding costs next to nothing.
    """

    rows: int
    adapters: int
    tokens: int | None
    positions: int
    scoring: int = 0
    entries: int = 1_000_000
    padding: float = 1.5
    short: int = 64


def choose_batch(waiting: Sequence[BatchRow], limits: BatchLimits) -> list[BatchRow]:
    """The rows to run next, from `waiting`, oldest first.

    The oldest is always included, so that no row starves; others join in order if they fit. Left padding makes every
    row as long as the longest, so a short question does not join a long document's batch unless many share the cost.
    """
    chosen: list[BatchRow] = []
    for row in waiting:
        if len(chosen) == limits.rows:
            break
        if not chosen or _fits([*chosen, row], limits):
            chosen.append(row)
    return chosen


def _fits(rows: Sequence[BatchRow], limits: BatchLimits) -> bool:
    prompts = [len(row.prompt_ids) for row in rows]
    longest = max(prompts)
    width = longest + max(row.max_tokens for row in rows)
    adapters = {adapter_key(row.adapter) for row in rows if row.adapter}
    entries = sum(len(row.prompt_ids) * (1 + row.n_prompt_top) for row in rows if row.n_prompt_top is not None)
    scoring = limits.scoring if entries else 0
    return (
        len(adapters) <= limits.adapters
        and width <= limits.positions
        and entries <= limits.entries
        and (limits.tokens is None or width * len(rows) + scoring <= limits.tokens)
        and (longest <= limits.short or longest * len(rows) <= limits.padding * sum(prompts))
    )


def adapter_key(adapter: Adapter) -> str:
    """Identity of an adapter's weights: its digest; without one, the folder and the times of its files."""
    if adapter.spec.digest:
        return adapter.spec.digest
    files = sorted(p for p in adapter.path.glob("*") if p.is_file())
    stamps = ",".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p, s in ((p, p.stat()) for p in files))
    return f"{adapter.path}:{stamps}"


class WaitingRows:
    """The queue between the event loop and the worker thread.

    Rows that arrive together should run together, because the next batch starts only after this one. So a batch that is
    not full waits for rows being prepared, and briefly for others.

    Args:
        n_full: enough rows for a batch.
        gather_s: how long after an arrival to wait for another one.
        gather_at_most_s: how long to wait in all.
    """

    def __init__(self, n_full: int, gather_s: float = 0.003, gather_at_most_s: float = 0.1) -> None:
        self._n_full, self._gather_s, self._gather_at_most_s = n_full, gather_s, gather_at_most_s
        self._rows: list[BatchRow] = []
        self._n_expected = 0
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce a row that is prepared, and put or abandoned, inside this block."""
        self._expect(1)
        try:
            yield
        finally:
            self._expect(-1)

    def _expect(self, n: int) -> None:
        with self._changed:
            self._n_expected += n
            self._changed.notify()

    def put(self, row: BatchRow) -> bool:
        """Add a row; returns False if the queue is closed."""
        with self._changed:
            if not self._closed:
                self._rows.append(row)
                self._changed.notify()
            return not self._closed

    def close(self) -> None:
        """Accept no more rows; `take` returns the remaining ones, then nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, limits: Callable[[], BatchLimits]) -> list[BatchRow]:
        """Wait for rows and return a batch; an empty one if the queue is closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: bool(self._rows) or self._closed)
                self._gather()
                self._rows = [row for row in self._rows if not row.cancelled]
                if self._rows:
                    batch = choose_batch(self._rows, limits())
                    self._rows = [row for row in self._rows if row not in batch]
                    return batch
                if self._closed:
                    return []

    def abandon(self) -> list[BatchRow]:
        """Close, and return all waiting rows."""
        self.close()
        with self._changed:
            rows, self._rows = self._rows, []
            return rows

    def _gather(self) -> None:
        give_up_at = time.monotonic() + self._gather_at_most_s
        while not self._closed and len(self._rows) < self._n_full and time.monotonic() < give_up_at:
            if not self._changed.wait(self._gather_s) and not self._n_expected:
                return
