"""HFExpert: one resident model, which batches its requests on one worker thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from coe.engines import chat
from coe.engines.answer import AnswerStreams, demands_call
from coe.engines.base import Adapter
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.constrained.compiler import Grammars
from coe.engines.constrained.grammar import Grammar
from coe.engines.constrained.matcher import Matcher
from coe.engines.embedding import check_generates
from coe.engines.hf.admission import Joining
from coe.engines.hf.artifacts import KeptArtifacts
from coe.engines.hf.batch import BatchRow, RowState, deliver
from coe.engines.hf.jobs import Batching, Call, Job
from coe.engines.hf.load import LoadedModel, translate
from coe.engines.hf.logprobs import SCORING_BYTES, scoring_bytes
from coe.engines.hf.loop import BatchLoop, padded
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.lora.mixture import RowSlot
from coe.engines.hf.notes.row_prompt import PeerReading, RowPrompt, RowReads, TemplateTurns
from coe.engines.hf.sampling import Sampling, processors
from coe.engines.hf.waiting import BatchLimits, WaitingRows
from coe.engines.latent.decoders import Decoder
from coe.engines.logprobs import TokenTexts, check_tokens
from coe.engines.render import Renderer
from coe.errors import EngineError, OutOfMemory, Unsupported
from coe.types import Chunk, GenerateRequest
from registry.digest import identity
from registry.spec import ExpertSpec

_PREPARING_THREADS: Final = 2
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
        self.context_length = min(spec.context_length or loaded.context_length, loaded.context_length)
        self._loaded: LoadedModel | None = loaded
        self._slots = AdapterSlots(loaded.model, spec.name, max_adapters)
        self._max_adapters = max_adapters
        self._cache_bytes, self.n_prefill = cache_bytes, n_prefill
        self._renderer = renderer
        self._answers = AnswerStreams(loaded.tokenizer)
        self._texts = TokenTexts(loaded.tokenizer)
        self._turns = TemplateTurns(loaded.tokenizer, renderer)
        self._n_ids: int = loaded.model.get_input_embeddings().weight.shape[0]
        self._grammars = Grammars(loaded.tokenizer, self._n_ids, checker)
        self._styles: dict[str, chat.ChatStyle] = {}
        self.artifacts = KeptArtifacts()  # of compositions that this expert is a member of
        self._waiting = WaitingRows(max_batch)
        self._batch: list[BatchRow] = []  # that the worker thread runs now
        # Its own threads: a megabyte takes seconds to tokenise, which must not hold the threads of other experts.
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix=f"hf:{spec.name}")
        self._thread = threading.Thread(target=self._work, name=f"hf:{spec.name}", daemon=True)
        self._thread.start()

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
        matcher = await self._matcher(await self._format(request), adapter)
        with self._waiting.expecting():  # a batch waits for a slow template too, but never long
            row = await self._row(request, adapter, matcher, reading)
            row.state = state
            if not self._waiting.put(row):
                raise self._gone()
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
            request = replace(request, tool_choice="auto") if demands_call(request) else request
            return await self._row(request, adapter, None, reading)
        return await self._row(request, adapter, await self._matcher(await self._format(request), adapter), reading)

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
            job.fail(self._gone())
        return job.future

    async def close(self) -> None:
        """Finish the accepted requests, accept no more, and free the weights. Jobs that wait fail."""
        self._waiting.close()
        for job in self._waiting.take_jobs():
            job.fail(self._gone())
        await off_the_loop(self._thread.join)
        self._preparing.shutdown(wait=False)
        self._grammars.close()
        self._loaded = None
        del self._slots

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
        if self._loaded is None:
            raise self._gone()
        return self._loaded

    def decoder(self) -> Decoder:
        """The parts of the model. Raises Unsupported for an unsupported architecture."""
        return Decoder.of(self.loaded.model, expert=self.spec.name)

    def _gone(self) -> EngineError:
        return EngineError(f"{self.spec.name!r} was unloaded: load it again")

    # In the caller's thread

    async def _row(
        self,
        request: GenerateRequest,
        adapter: Adapter | None,
        matcher: Matcher | None,
        reading: PeerReading | None = None,
    ) -> BatchRow:
        style = await self._style(reading.styled_by if reading else adapter)
        prompt = await self._render(request, style, adapter)
        if self._loaded is None:
            raise self._gone()
        loop = asyncio.get_running_loop()
        if demands_call(request):
            matcher = await self._call_matcher(request, prompt, style, adapter)
        prepare = partial(self._prepare, request, prompt, style, adapter, loop, reading)
        row = await loop.run_in_executor(self._preparing, prepare)
        row.matcher = matcher
        return row

    async def _style(self, adapter: Adapter | None) -> chat.ChatStyle:
        if adapter is None:
            return chat.ChatStyle()
        key = adapter.key()
        if key not in self._styles:
            self._styles[key] = await asyncio.to_thread(chat.ChatStyle.read, adapter.path)
        return self._styles[key]

    async def _format(self, request: GenerateRequest) -> Grammar | None:
        """The grammar of an answer in a format. A large schema takes 0.1 s to read."""
        if request.format == "text":
            return None
        return await asyncio.get_running_loop().run_in_executor(self._preparing, Grammar.of_request, request)

    async def _matcher(self, grammar: Grammar | None, adapter: Adapter | None) -> Matcher | None:
        """What keeps the answer in the required format, if there is one."""
        if grammar is None:
            return None
        if self._loaded is None:
            raise self._gone()
        return await self._grammars.matcher(grammar, expert=adapter.spec.name if adapter else self.spec.name)

    async def _call_matcher(
        self, request: GenerateRequest, prompt: str, style: chat.ChatStyle, adapter: Adapter | None
    ) -> Matcher | None:
        """What makes the answer a call of a tool."""
        name = adapter.spec.name if adapter else self.spec.name
        make = partial(self._answers.grammar, request, prompt, style, expert=name)
        return await self._matcher(await asyncio.get_running_loop().run_in_executor(self._preparing, make), adapter)

    async def _render(self, request: GenerateRequest, style: chat.ChatStyle, adapter: Adapter | None) -> str:
        """The prompt as text. Rendering may take as long as its limits allow, so no thread of the loop waits for it."""
        if request.prompt is not None:
            return request.prompt
        if (loaded := self._loaded) is None:
            raise self._gone()
        name = adapter.spec.name if adapter else self.spec.name
        future = chat.render(loaded.tokenizer, request, self._renderer, style, expert=name)
        return await asyncio.wrap_future(future)

    def _prepare(
        self,
        request: GenerateRequest,
        prompt: str,
        style: chat.ChatStyle,
        adapter: Adapter | None,
        loop: asyncio.AbstractEventLoop,
        reading: PeerReading | None,
    ) -> BatchRow:
        loaded = self._loaded
        if loaded is None:
            raise self._gone()
        name = adapter.spec.name if adapter else self.spec.name
        prompt_ids = list(request.prompt_ids) or chat.encode_text(loaded.tokenizer, prompt, expert=name)
        check_tokens(request, self._n_ids, expert=name)
        if request.notes_wanted is not None and not request.notes_wanted.answer:
            request = replace(request, max_tokens=1)  # it generates none: the prompt may take the context
        context = self._context(adapter)
        found = RowPrompt(
            request, prompt, prompt_ids, style, loaded.model, loaded.tokenizer, self._turns, context, expert=name
        )
        reads = reading.prepare(found) if reading else RowReads()
        ids = reads.columns.ids if reads.columns else prompt_ids
        n_new = request.token_limit(len(ids), context, expert=name)
        capture = found.capture(self._identity(adapter), n_new) if request.wants == "latent" else None
        request = replace(request, max_tokens=n_new)
        ends = loaded.eos | chat.token_ids(loaded.tokenizer, style.eos)
        eos = frozenset() if request.sampling.ignore_eos else ends
        scored = request.logprobs is not None or request.prompt_logprobs is not None
        return BatchRow(
            request=request,
            prompt_ids=ids,
            adapter=adapter,
            eos=eos,
            text=self._answers.stream(request, prompt, prompt_ids, style, ends, expert=name),
            sampling=Sampling.of(request.temperature, request.top_p, request.seed, request.sampling),
            loop=loop,
            processors=processors(request.sampling, len(ids), eos, loaded.model.device),
            echo=self._echo(request, prompt) if request.echo else "",
            texts=self._texts if scored else None,
            capture=capture,
            notes=reads.notes,
            columns=reads.columns,
            remarks=reads.remarks,
        )

    def _echo(self, request: GenerateRequest, prompt: str) -> str:
        """The text of the prompt."""
        return self._texts.text(request.prompt_ids) if request.prompt_ids else prompt

    def _context(self, adapter: Adapter | None) -> int:
        """Most tokens of prompt and answer."""
        of_adapter = adapter.spec.context_length if adapter else None
        return min(self.context_length, of_adapter or self.context_length)

    def _identity(self, adapter: Adapter | None) -> str | None:
        """Identity of this expert or of an adapter on it; `None` for what is composed of several."""
        spec, known = adapter.spec if adapter else self.spec, {self.spec.name: self.spec}
        return identity(spec, known) if known.keys() >= {*spec.references} else None

    # In the worker thread

    def _work(self) -> None:
        try:
            while (rows := self._waiting.take(self._limits)) != []:
                self._batch = list(rows or ())
                self._run_jobs()
                if rows:
                    self._run(rows)
        except Exception as error:  # such as a lost device: all waiting requests must fail
            lost = [*self._batch, *self._waiting.abandon()]
            cause = EngineError(
                f"the worker of {self.spec.name!r} ended: {type(error).__name__}: {error}; load it again"
            )
            for row in lost:
                row.fail(cause)
            for job in self._waiting.take_jobs():
                job.fail(cause)
            deliver(lost)

    def _run_jobs(self, running: Sequence[RowSlot] = ()) -> None:
        """Run the jobs that wait.

        Args:
            running: slots of the rows of the running batch.
        """
        assert self._loaded is not None  # freed only after this thread has ended
        if self._slots.has_activated(running):
            return
        for job in self._waiting.take_jobs():
            job.run(self._loaded.model, self._slots, running)

    def _limits(self, n_held: int = 0) -> BatchLimits:
        """What a batch may take, whose cache holds this many tokens now."""
        assert self._loaded is not None  # freed only after this thread has ended
        per_token = self._loaded.cache_bytes_per_token
        scoring = max(SCORING_BYTES, scoring_bytes(self._loaded.model, self.capacity))
        return BatchLimits(
            rows=self.capacity,
            adapters=self._max_adapters,
            tokens=self._cache_bytes(n_held * per_token) // per_token,
            positions=self.context_length,
            scoring=-(-scoring // per_token),
            prefill=self.n_prefill,
        )

    def _run(self, rows: Sequence[BatchRow]) -> None:
        for row in rows:
            self._acquire(row, rows)
        deliver(rows)
        live = [row for row in rows if not row.done]
        batches = self._slots.batches([row.slot for row in live])
        if not batches:
            return
        first, *others = ([live[position] for position in batch] for batch in batches)
        self._waiting.put_back([row for batch in others for row in batch])
        self._batch = list(first)
        self._generate_or_split(first)

    def _acquire(self, row: BatchRow, rows: Sequence[BatchRow]) -> None:
        """Load the adapter of a row; if that fails, only this row does."""
        if row.adapter is None:
            return
        try:
            with translate(f"adapter {row.adapter.spec.name!r} cannot be loaded", EngineError):
                row.slot = self._slots.acquire(row.adapter, {r.slot for r in rows if r.slot})
            if row.columns is not None and self._slots.has_activated([row.slot]):  # its prompt is read in parts
                raise Unsupported(
                    f"adapter {row.adapter.spec.name!r} acts from its invocation tokens on (aLoRA): it cannot read the "
                    "key-value entries of peers"
                )
        except EngineError as error:
            row.fail(error)

    def _generate_or_split(self, rows: Sequence[BatchRow], *, others_wait: bool = False) -> None:
        """If memory runs out before the first token, try half as many rows; none joins while the others wait."""
        if not self._attempt(rows, joinable=not others_wait):
            half = len(rows) // 2
            self._generate_or_split(rows[:half], others_wait=True)
            self._generate_or_split(rows[half:], others_wait=others_wait)

    def _attempt(self, rows: Sequence[BatchRow], *, joinable: bool) -> bool:
        try:
            with translate(f"{self.spec.name!r} failed while generating", EngineError):
                self._generate(rows, joinable=joinable)
        except EngineError as error:
            if isinstance(error, OutOfMemory) and len(rows) > 1 and not any(row.n_generated for row in rows):
                return False
            failed = [*rows, *self._batch] if joinable else rows
            for row in failed:
                row.fail(error)
            deliver(failed)
        return True

    def _joining(self) -> Joining:
        return Joining(self._waiting, self._slots, self._limits, self._acquire, self._batch, self.n_prefill)

    def _generate(self, rows: Sequence[BatchRow], *, joinable: bool) -> None:
        import torch

        assert self._loaded is not None
        device, pad = self._loaded.model.device, min(self._loaded.eos, default=0)
        admission = self._joining() if joinable else None
        with torch.inference_mode():
            ids, mask = padded(rows, pad, device)
            self._slots.generate(
                [row.slot for row in rows],
                inputs=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(1, *(row.max_tokens for row in rows)),
                custom_generate=BatchLoop(rows, self._slots, admission, pad, self._run_jobs),
            )


async def off_the_loop(call: Callable[[], object]) -> None:
    """Run `call` in a thread; at interpreter exit, when no thread starts, right here.

    A worker that still runs when the interpreter ends aborts the process, so it is waited for then, too.
    """
    if threading.main_thread().is_alive():
        await asyncio.to_thread(call)
    else:
        call()
