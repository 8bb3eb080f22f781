"""What happens to a request before vLLM gets it: template, tokens, limits, format of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from coe.engines import chat
from coe.engines.answer import AnswerStream, demands_call
from coe.engines.base import Adapter
from coe.engines.constrained.grammar import Grammar
from coe.engines.logprobs import check_tokens
from coe.engines.render import Renderer
from coe.engines.vllm.parsers import ParserNames, reads_with_parser
from coe.engines.vllm.running import Running
from coe.engines.vllm.sampling import sampling_arguments
from coe.types import GenerateRequest
from registry.spec import ExpertSpec

_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready for vLLM.

    Attributes:
        prompt: its text; empty for token prompts.
        prompt_ids: its tokens.
        salt: of the prefix cache: the digest of the expert that answers.
        max_tokens: most new tokens.
        ends: tokens that end the answer.
        sampling: arguments of SamplingParams.
        constraint: arguments of StructuredOutputsParams; None if any text may be the answer.
        stream: reads the answer's tokens, if it may have reasoning or tool calls; else vLLM makes its text.
    """

    request: GenerateRequest
    prompt: str
    prompt_ids: list[int]
    salt: str
    max_tokens: int
    ends: frozenset[int]
    sampling: Mapping[str, Any]
    constraint: Mapping[str, str] | None
    stream: AnswerStream | None

    @property
    def is_read_whole(self) -> bool:
        """Whether vLLM may keep the answer until it ends: only the whole is read, and vLLM itself finds its end."""
        return not self.request.stream and (self.stream is None or not self.stream.watches)


class Preparation:
    """Prepares the requests of one expert.

    Chat templates render in a process of their own, as for the hf engine, so that a template that does not end cannot
    hold vLLM. Prompts are tokenised in the threads of this object.

    Args:
        spec: the expert.
        renderer: renders the chat templates of the model and its adapters.
    """

    def __init__(self, spec: ExpertSpec, renderer: Renderer) -> None:
        self._spec, self._renderer = spec, renderer
        self._styles = chat.ChatStyles()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"vllm:{spec.name}")

    def close(self) -> None:
        """Prepare no more."""
        self._threads.shutdown(wait=False)

    async def prepare(self, running: Running, request: GenerateRequest, adapter: Adapter | None) -> Prepared:
        """The request as vLLM needs it.

        Raises:
            ContextLengthExceeded, Rejected: this expert cannot take it.
            TemplateError: the chat template is broken, or exceeds its limits.
            ConfigError: vLLM has no such parser as the expert names.
        """
        name = adapter.spec.name if adapter else self._spec.name
        style = await self._styles.of(adapter)
        prompt = request.prompt
        if prompt is None:
            prompt = await asyncio.wrap_future(
                chat.render(running.tokenizer, request, self._renderer, style, expert=name)
            )
        constraint = await self._constraint(running, request, prompt, style, name)
        prepared = partial(self._prepared, running, request, prompt, style, adapter, name, constraint)
        return await asyncio.get_running_loop().run_in_executor(self._threads, prepared)

    async def _constraint(
        self, running: Running, request: GenerateRequest, prompt: str, style: chat.ChatStyle, name: str
    ) -> dict[str, str] | None:
        """What keeps the answer in the required format, checked within limits of time and memory."""
        grammar = Grammar.of_request(request)
        if demands_call(request):
            make = partial(running.answers.grammar, request, prompt, style, expert=name)
            grammar = await asyncio.get_running_loop().run_in_executor(self._threads, make)
        return None if grammar is None else await running.grammars.constraint(grammar, expert=name)

    def _prepared(
        self,
        running: Running,
        request: GenerateRequest,
        prompt: str,
        style: chat.ChatStyle,
        adapter: Adapter | None,
        name: str,
        constraint: Mapping[str, str] | None,
    ) -> Prepared:
        check_tokens(request, running.n_ids, expert=name)
        prompt_ids = list(request.prompt_ids) or chat.encode_text(running.tokenizer, prompt, expert=name)
        spec = adapter.spec if adapter else self._spec
        limits = (running.context_length, self._spec.context_length, spec.context_length)
        limit = min(each for each in limits if each)
        max_tokens = request.token_limit(len(prompt_ids), limit, expert=name)
        ends = running.ends | chat.token_ids(running.tokenizer, style.eos)
        parsers = ParserNames.of(spec, self._spec)
        if parsers and reads_with_parser(request):
            stream = running.parsers.stream(parsers, request, prompt_ids, ends, expert=name)
        else:
            stream = running.answers.stream(request, prompt, prompt_ids, style, ends, expert=name)
        return Prepared(
            request=request,
            prompt=prompt,
            prompt_ids=prompt_ids,
            salt=spec.digest or spec.ref,
            max_tokens=max_tokens,
            ends=frozenset() if request.sampling.ignore_eos else ends,
            sampling=sampling_arguments(request, max_tokens=max_tokens, ends=ends),
            constraint=constraint,
            stream=stream if request.messages else None,
        )
