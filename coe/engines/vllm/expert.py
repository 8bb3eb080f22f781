"""VLLMExpert: one model in one vLLM engine process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from coe.engines import chat
from coe.engines.base import Adapter
from coe.engines.hf.batch import adapter_key
from coe.engines.hf.logprobs import MOST_TOP, TokenTexts
from coe.engines.render import Renderer
from coe.engines.vllm.adapters import AdapterChecks, Adapters
from coe.engines.vllm.answer import AnswerChunks
from coe.engines.vllm.core import Core
from coe.engines.vllm.errors import is_dead, lost, request_error
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import start, stop
from coe.engines.vllm.sampling import sampling_arguments
from coe.errors import Rejected, Unsupported
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

_ATTEMPTS: Final = 2
"""How often a request is given to an engine process, if the first dies before the first text: a request that ends
every process must not be tried for ever."""
_PREPARING_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine: vLLM's AsyncLLM with the adapters in it, and what is read from its model."""

    llm: Any
    adapters: Adapters
    tokenizer: Any
    texts: TokenTexts
    ends: frozenset[int]
    n_ids: int
    context_length: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready for vLLM.

    prompt: its text; empty for token prompts. max_tokens: most new tokens. sampling: arguments of SamplingParams.
    """

    request: GenerateRequest
    prompt: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: Mapping[str, Any]


class VLLMExpert:
    """A model that vLLM serves; requests with different adapters share its batches.

    Chat templates render in a process of their own, as for the hf engine, so that a template that does not end cannot
    hold vLLM. Every prompt has the expert's digest as cache salt: cached prefixes are never used by another expert.

    Args:
        spec: the expert.
        path: folder of the model.
        options: of the engine.
        renderer: renders the chat templates of the model and its adapters.
    """

    def __init__(self, spec: ExpertSpec, path: Path, options: Options, renderer: Renderer) -> None:
        self.spec = spec
        self.capacity = options.max_num_seqs
        self.core: Core[Running] = Core(spec.name, self._start, self._stop)
        self._path, self._options, self._renderer = path, options, renderer
        self._checks = AdapterChecks(spec.name, path, options.max_lora_rank)
        self._styles: dict[str, chat.ChatStyle] = {}
        self._ids = count(1)
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix=f"vllm:{spec.name}")

    async def open(self) -> None:
        """Start the engine process. Raises WeightsError, OutOfMemory or ConfigError."""
        await self.core.open()

    async def close(self) -> None:
        """End the engine process and wait until it is gone; running answers fail."""
        await self.core.close()
        self._preparing.shutdown(wait=False)

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated; see `Expert.generate`. Usage counts all tokens, an end token too."""
        name = adapter.spec.name if adapter else self.spec.name
        shown = False
        for attempt in range(_ATTEMPTS):
            running = await self.core.live()
            try:
                async with aclosing(self._attempt(running, request, adapter)) as chunks:
                    async for chunk in chunks:
                        shown = shown or not chunk.is_empty
                        yield chunk
                return
            except Exception as error:
                if not is_dead(error):
                    raise request_error(name, error) from error
                self.core.lost(running)
                if shown or attempt == _ATTEMPTS - 1:
                    raise lost(name, shown=shown) from error

    async def _attempt(
        self, running: Running, request: GenerateRequest, adapter: Adapter | None
    ) -> AsyncGenerator[Chunk, None]:
        if adapter is not None and not self._options.max_loras:
            raise Unsupported(f"{self.spec.name!r} takes no adapters, because engines.vllm.max_loras is 0")
        prepared = await self._prepare(running, request, adapter)
        answer = AnswerChunks(
            prepared.request, prepared.prompt, prepared.prompt_ids, prepared.max_tokens, running.texts
        )
        async with running.adapters.lease(adapter) if adapter else nullcontext() as lora:
            outputs = running.llm.generate(
                self._prompt(prepared, adapter), self._params(prepared), f"coe-{next(self._ids)}", lora_request=lora
            )
            async with aclosing(outputs):
                async for output in outputs:
                    chunk = answer.chunk(output)
                    if chunk is not None:
                        yield chunk

    def _prompt(self, prepared: Prepared, adapter: Adapter | None) -> Any:
        from vllm.inputs import tokens_input

        spec = adapter.spec if adapter else self.spec
        return tokens_input(prepared.prompt_ids, cache_salt=spec.digest or spec.ref)

    def _params(self, prepared: Prepared) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(**prepared.sampling, output_kind=RequestOutputKind.DELTA)

    # Before vLLM

    async def _prepare(self, running: Running, request: GenerateRequest, adapter: Adapter | None) -> Prepared:
        style = await self._style(adapter)
        prompt = request.prompt
        if prompt is None:
            name = adapter.spec.name if adapter else self.spec.name
            future = chat.render(running.tokenizer, request, self._renderer, style, expert=name)
            prompt = await asyncio.wrap_future(future)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self._prepared, running, request, prompt, style, adapter)

    async def _style(self, adapter: Adapter | None) -> chat.ChatStyle:
        if adapter is None:
            return chat.ChatStyle()
        key = adapter_key(adapter)
        if key not in self._styles:
            self._styles[key] = await asyncio.to_thread(chat.ChatStyle.read, adapter.path)
        return self._styles[key]

    def _prepared(
        self, running: Running, request: GenerateRequest, prompt: str, style: chat.ChatStyle, adapter: Adapter | None
    ) -> Prepared:
        name = adapter.spec.name if adapter else self.spec.name
        self._check(running, request, name)
        prompt_ids = list(request.prompt_ids) or chat.encode_text(running.tokenizer, prompt, expert=name)
        limit = running.context_length
        if adapter and adapter.spec.context_length:
            limit = min(limit, adapter.spec.context_length)
        max_tokens = request.token_limit(len(prompt_ids), limit, expert=name)
        ends = running.ends | chat.token_ids(running.tokenizer, style.eos)
        sampling = sampling_arguments(request, max_tokens=max_tokens, ends=ends)
        return Prepared(request, prompt, prompt_ids, max_tokens, sampling)

    def _check(self, running: Running, request: GenerateRequest, name: str) -> None:
        """Raises Rejected for a token id that the vocabulary does not have, or too many log-probabilities."""
        if (most := max(request.logprobs or 0, request.prompt_logprobs or 0)) > MOST_TOP:
            raise Rejected(f"{name!r} returns at most {MOST_TOP} most likely tokens for each token, not {most:,}")
        for field, ids in (("prompt", request.prompt_ids), ("logit_bias", request.sampling.logit_bias)):
            wrong = next((i for i in ids if not 0 <= i < running.n_ids), None)
            if wrong is not None:
                raise Rejected(
                    f"{field} has the token id {wrong}, but the vocabulary of {name!r} has {running.n_ids:,} tokens: "
                    f"send ids from 0 to {running.n_ids - 1}, made with the tokenizer of this expert"
                )

    # The engine process

    async def _start(self) -> Running:
        llm = await asyncio.to_thread(start, self.spec.name, self._path, self._options)
        try:
            return self._describe(llm)
        except BaseException:
            await asyncio.to_thread(stop, llm)
            raise

    def _describe(self, llm: Any) -> Running:
        from vllm.lora.request import LoRARequest

        config, tokenizer = llm.model_config, llm.get_tokenizer()
        length = min(self.spec.context_length or config.max_model_len, config.max_model_len)
        return Running(
            llm=llm,
            adapters=Adapters(llm, self._options.max_cpu_loras, self._checks.check, LoRARequest),
            tokenizer=tokenizer,
            texts=TokenTexts(tokenizer),
            ends=_ends(config, tokenizer),
            n_ids=config.get_vocab_size(),
            context_length=length,
        )

    async def _stop(self, running: Running) -> None:
        await asyncio.to_thread(stop, running.llm)


def _ends(config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, from the generation config, the config and the tokenizer."""
    generation = config.try_get_generation_config()
    stated = (generation.get("eos_token_id"), config.hf_text_config.eos_token_id, tokenizer.eos_token_id)
    return frozenset(
        each for ids in stated if ids is not None for each in (ids if isinstance(ids, list | tuple) else [ids])
    )
