"""From a request to a row of a batch: the prompt is rendered, tokenised and checked, in the caller's threads."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final

from coe.engines import chat
from coe.engines.answer import AnswerStreams, demands_call
from coe.engines.base import Adapter
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.constrained.compiler import Grammars
from coe.engines.constrained.grammar import Grammar
from coe.engines.constrained.matcher import Matcher
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.load import LoadedModel
from coe.engines.hf.notes.row_prompt import PeerReading, RowPrompt, RowReads, TemplateTurns
from coe.engines.hf.sampling import Sampling, processors
from coe.engines.logprobs import TokenTexts, check_tokens
from coe.engines.render import Renderer
from coe.errors import EngineError
from coe.types import GenerateRequest
from registry.digest import identity
from registry.spec import ExpertSpec

_PREPARING_THREADS: Final = 2


class RowPreparation:
    """Prepares the rows of one resident model and of the adapters on it.

    Chat templates render in a process of their own.

    Args:
        spec: the expert.
        loaded: the model, its tokenizer and limits.
        renderer: renders the chat templates of the model and its adapters.
        checker: checks grammars before they are compiled.
    """

    def __init__(self, spec: ExpertSpec, loaded: LoadedModel, *, renderer: Renderer, checker: GrammarChecker) -> None:
        self.spec = spec
        self.context_length = min(spec.context_length or loaded.context_length, loaded.context_length)
        self._loaded: LoadedModel | None = loaded
        self._renderer = renderer
        self._answers = AnswerStreams(loaded.tokenizer)
        self._texts = TokenTexts(loaded.tokenizer)
        self._turns = TemplateTurns(loaded.tokenizer, renderer)
        self._n_ids: int = loaded.model.get_input_embeddings().weight.shape[0]
        self.grammars = Grammars(loaded.tokenizer, self._n_ids, checker)
        self._styles = chat.ChatStyles()
        # Its own threads: a megabyte takes seconds to tokenise, which must not hold the threads of other experts.
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix=f"hf:{spec.name}")

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer. Raises EngineError after `close`."""
        if self._loaded is None:
            raise self.gone()
        return self._loaded

    def gone(self) -> EngineError:
        """The error of a request to an expert that was unloaded."""
        return EngineError(f"{self.spec.name!r} was unloaded: load it again")

    def close(self) -> None:
        """Free the model, and accept no more requests."""
        self._threads.shutdown(wait=False)
        self.grammars.close()
        self._loaded = None

    async def matcher(self, request: GenerateRequest, adapter: Adapter | None) -> Matcher | None:
        """What keeps the answer in the required format, if there is one."""
        return await self._matcher(await self._format(request), adapter)

    async def row(
        self,
        request: GenerateRequest,
        adapter: Adapter | None,
        matcher: Matcher | None,
        reading: PeerReading | None = None,
    ) -> BatchRow:
        """The row of a request, whose answer the matcher keeps in its format; a demanded call of a tool has its own.

        Args:
            reading: sees the rendered prompt.

        Raises:
            ContextLengthExceeded, TemplateError, Rejected, EngineError: as `Expert.generate`.
        """
        style = await self._styles.of(reading.styled_by if reading else adapter)
        prompt = await self._render(request, style, adapter)
        if self._loaded is None:
            raise self.gone()
        loop = asyncio.get_running_loop()
        if demands_call(request):
            matcher = await self._call_matcher(request, prompt, style, adapter)
        prepare = partial(self._prepare, request, prompt, style, adapter, loop, reading)
        row = await loop.run_in_executor(self._threads, prepare)
        row.matcher = matcher
        return row

    async def _format(self, request: GenerateRequest) -> Grammar | None:
        """The grammar of an answer in a format. A large schema takes 0.1 s to read."""
        if request.format == "text":
            return None
        return await asyncio.get_running_loop().run_in_executor(self._threads, Grammar.of_request, request)

    async def _matcher(self, grammar: Grammar | None, adapter: Adapter | None) -> Matcher | None:
        """What keeps the answer in the required format, if there is one."""
        if grammar is None:
            return None
        if self._loaded is None:
            raise self.gone()
        return await self.grammars.matcher(grammar, expert=adapter.spec.name if adapter else self.spec.name)

    async def _call_matcher(
        self, request: GenerateRequest, prompt: str, style: chat.ChatStyle, adapter: Adapter | None
    ) -> Matcher | None:
        """What makes the answer a call of a tool."""
        name = adapter.spec.name if adapter else self.spec.name
        make = partial(self._answers.grammar, request, prompt, style, expert=name)
        return await self._matcher(await asyncio.get_running_loop().run_in_executor(self._threads, make), adapter)

    async def _render(self, request: GenerateRequest, style: chat.ChatStyle, adapter: Adapter | None) -> str:
        """The prompt as text. Rendering may take as long as its limits allow, so no thread of the loop waits for it."""
        if request.prompt is not None:
            return request.prompt
        if (loaded := self._loaded) is None:
            raise self.gone()
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
            raise self.gone()
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
            peers=reads.peers,
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
