"""HFExpert: one resident model, which batches its requests on one worker thread.

A request becomes a row in the caller's threads (`prepare.py`); the worker thread (`worker.py`) takes the waiting rows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from coe.engines.answer import demands_call
from coe.engines.base import Adapter
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.embedding import check_generates
from coe.engines.hf.artifacts import KeptArtifacts
from coe.engines.hf.batch import BatchRow, RowState
from coe.engines.hf.jobs import Batching, Call, Job
from coe.engines.hf.load import LoadedModel
from coe.engines.hf.notes.row_prompt import PeerReading
from coe.engines.hf.prepare import RowPreparation
from coe.engines.hf.waiting import WaitingRows
from coe.engines.hf.worker import BatchWorker
from coe.engines.latent.decoders import Decoder
from coe.engines.render import Renderer
from coe.errors import OutOfMemory
from coe.sampling import NO_OPTIONS
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

T = TypeVar("T")


class HFExpert:
    """A transformers model that answers up to `capacity` requests in one batch, adapters mixed.

    Chat templates render in a process of their own, prompts are checked in the caller's threads. A worker thread takes
    the waiting requests, runs one `model.generate` for all of them, and hands text to each reader as its tokens come.
    A row that is finished or cancelled ends at once for its reader and leaves the batch; a request that comes meanwhile
    joins it before its next token, if it fits (`choose_joining`); the batch ends with its last row. What composes this
    expert with others runs its own forwards on that thread, too, between the steps of the batch (`run`).

    Args:
        spec: the expert.
        loaded: the model, its tokenizer and limits.
        max_batch: most rows of a batch.
        max_adapters: most adapters kept on the model.
        cache_bytes: bytes that the key-value cache of a batch may take, given those that it takes now.
        n_prefill: most tokens of prompts to read between two tokens of a running batch.
        renderer: renders the chat templates of the model and its adapters.
        checker: checks grammars before they are compiled.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        loaded: LoadedModel,
        *,
        max_batch: int,
        max_adapters: int,
        cache_bytes: Callable[[int], int],
        n_prefill: int,
        renderer: Renderer,
        checker: GrammarChecker,
    ) -> None:
        self.spec = spec
        self.capacity = max_batch
        self._preparation = RowPreparation(spec, loaded, renderer=renderer, checker=checker)
        self.context_length = self._preparation.context_length
        self._cache_bytes, self.n_prefill = cache_bytes, n_prefill
        self.artifacts = KeptArtifacts()  # of compositions that this expert is a member of
        self._waiting = WaitingRows(max_batch)
        self._worker = BatchWorker(
            spec.name,
            loaded,
            self._waiting,
            max_batch=max_batch,
            max_adapters=max_adapters,
            cache_bytes=cache_bytes,
            context_length=self.context_length,
            n_prefill=n_prefill,
        )

    async def generate(
        self,
        request: GenerateRequest,
        adapter: Adapter | None = None,
        *,
        state: RowState | None = None,
        reading: PeerReading | None = None,
    ) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated; see `Expert.generate`. Usage counts all tokens, an end token too.

        Args:
            state: sees the hidden states of this request.
            reading: notes of peers, which the request reads.
        """
        check_generates(request, self.spec.name)
        matcher = await self._preparation.matcher(request, adapter)
        with self._waiting.expecting():  # a batch waits for a slow template too, but never long
            row = await self._preparation.row(request, adapter, matcher, reading)
            row.state = state
            if not self._waiting.put(row):
                raise self._preparation.gone()
        try:
            while True:
                item = await row.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            row.cancelled = True

    async def prepare(
        self,
        request: GenerateRequest,
        adapter: Adapter | None = None,
        *,
        chooses: bool = True,
        reading: PeerReading | None = None,
    ) -> BatchRow:
        """A row for a request, which is not put into the queue: its prompt rendered, tokenised and checked.

        Args:
            chooses: whether the row chooses tokens, which then have the required format; else it only reads them.
            reading: sees the rendered prompt.

        Raises:
            ContextLengthExceeded, TemplateError, Rejected, EngineError: as `generate`.
        """
        if not chooses:
            # The options of sampling name tokens of the member that chooses.
            request = replace(request, sampling=NO_OPTIONS)
            request = replace(request, tool_choice="auto") if demands_call(request) else request
            return await self._preparation.row(request, adapter, None, reading)
        matcher = await self._preparation.matcher(request, adapter)
        return await self._preparation.row(request, adapter, matcher, reading)

    def run(
        self,
        call: Callable[[Any], T],
        adapters: Sequence[Adapter | None] = (None,),
        *,
        among: Sequence[Adapter | None] = (),
    ) -> Future[T]:
        """Call a function with the model on the worker thread: between two steps of the running batch, or at once.

        It should be short, such as one forward of some rows: the requests of the batch wait for it. A batch with an
        aLoRA is finished first.

        Args:
            call: takes the transformers model. Its forwards run in inference mode, and must not change the model.
            adapters: the adapter of each row of its forwards, `None` for the bare base.
            among: adapters that other jobs use in turn with this one: the model is prepared once for all of them.

        Returns:
            Its result, or its error: OutOfMemory, WeightsError if an adapter does not fit, Unsupported for an aLoRA,
            EngineError for any other one, or if the expert is closed first.
        """
        return self._put(Call((*adapters, *among), self.spec.name, call, len(adapters)))

    def _put(self, job: Job[T]) -> Future[T]:
        if not self._waiting.put_job(job):
            job.fail(self._preparation.gone())
        return job.future

    async def close(self) -> None:
        """Finish the accepted requests, accept no more, and free the weights. Jobs that wait fail."""
        self._waiting.close()
        for job in self._waiting.take_jobs():
            job.fail(self._preparation.gone())
        await off_the_loop(self._worker.join)
        self._preparation.close()

    def batches(self, adapters: Sequence[Adapter | None]) -> Future[list[list[int]]]:
        """Which rows with these adapters can be in one forward, as positions; the adapters are loaded.

        The future has the errors of `run`.
        """
        return self._put(Batching(tuple(adapters), self.spec.name))

    def require_cache(self, n_tokens: int) -> None:
        """Raises OutOfMemory if a key-value cache of so many tokens does not fit in what is free."""
        most = self._cache_bytes(0) // self.loaded.cache_bytes_per_token
        if n_tokens > most:
            raise OutOfMemory(
                f"the key-value cache of {n_tokens:,} tokens on {self.spec.name!r} does not fit in the free memory, "
                f"which holds {most:,}: lower max_tokens, or shorten the prompt"
            )

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer, for what composes it with others. Raises EngineError after `close`."""
        return self._preparation.loaded

    def decoder(self) -> Decoder:
        """The parts of the model. Raises Unsupported for an unsupported architecture."""
        return Decoder.of(self.loaded.model, expert=self.spec.name)


async def off_the_loop(call: Callable[[], object]) -> None:
    """Run `call` in a thread; at interpreter exit, when no thread starts, right here.

    A worker that still runs when the interpreter ends aborts the process, so it is waited for then, too.
    """
    if threading.main_thread().is_alive():
        await asyncio.to_thread(call)
    else:
        call()
