"""VLLMExpert: one model in one vLLM engine process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Adapter
from coe.engines.constrained.checker import GrammarChecker
from coe.engines.embedding import check_generates
from coe.engines.render import Renderer
from coe.engines.vllm.adapters import AdapterChecks
from coe.engines.vllm.answer import AnswerChunks
from coe.engines.vllm.canary import Canaries, ask_canary
from coe.engines.vllm.errors import died_after_loading, is_dead, lost, request_error
from coe.engines.vllm.options import Options
from coe.engines.vllm.parsers import ParserNames
from coe.engines.vllm.prepare import Preparation, Prepared
from coe.engines.vllm.process import (
    put_to_sleep,
    reload_weights,
    start_error,
    stop,
    wake_up,
    way_of_computing,
)
from coe.engines.vllm.running import Running, describe
from coe.engines.vllm.starting import start_in_thread
from coe.engines.vllm.supervised import ATTEMPTS, Supervised
from coe.errors import CoeError, EngineError, Unsupported
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

_AHEAD: Final = 4
"""vLLM is given one request more for every so many that it generates for at once; it keeps them waiting. Without them,
a place in its batch is empty for a step or two after each answer: a sixth of the places where answers are short."""


class VLLMExpert(Supervised[Running]):
    """A model that vLLM serves; requests with different adapters share its batches.

    Every prompt has the expert's digest as cache salt: a cached prefix is never used by another expert.

    Args:
        spec: the expert.
        path: folder of the model.
        options: of the engine.
        renderer: renders the chat templates of the model and its adapters.
        checker: checks grammars before they are compiled.
    """

    def __init__(
        self, spec: ExpertSpec, path: Path, options: Options, renderer: Renderer, checker: GrammarChecker
    ) -> None:
        super().__init__(spec, options)
        self.ahead = -(-options.max_num_seqs // _AHEAD)
        self.path, self._options, self._checker = path, options, checker
        self._preparation = Preparation(spec, renderer)
        self._parsers = ParserNames.of(spec)
        self._checks = AdapterChecks(spec.name, path, options.max_lora_rank)
        self._ids = count(1)

    async def close(self) -> None:
        """See `Supervised.close`."""
        await super().close()
        self._preparation.close()

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated; see `Expert.generate`. Usage counts all tokens, an end token too.

        An answer that is read only as a whole is held until it is complete, so that it can be generated again.
        """
        check_generates(request, self.spec.name)
        name = adapter.spec.name if adapter else self.spec.name
        if adapter is not None and not self._options.max_loras:
            raise Unsupported(f"{self.spec.name!r} takes no adapters, because engines.vllm.max_loras is 0")
        shown = False
        for attempt in range(ATTEMPTS):
            running, held = await self.core.live(), list[Chunk]()
            try:
                async with aclosing(self._attempt(running, request, adapter)) as chunks:
                    async for chunk in chunks:
                        if request.stream:
                            shown = shown or not chunk.is_empty
                            yield chunk
                        else:
                            held.append(chunk)
            except Exception as error:
                if not is_dead(error):
                    raise request_error(name, error) from error
                self.core.lost(running)
                if shown or attempt == ATTEMPTS - 1:
                    raise lost(name, shown=shown) from error
                continue
            for chunk in held:
                yield chunk
            return

    async def _attempt(
        self, running: Running, request: GenerateRequest, adapter: Adapter | None
    ) -> AsyncGenerator[Chunk, None]:
        prepared = await self._preparation.prepare(running, request, adapter)
        answer = AnswerChunks(prepared, running.texts)
        async with running.adapters.lease(adapter) if adapter else nullcontext() as lora:
            outputs = running.llm.generate(
                _prompt(prepared), _params(prepared), f"coe-{next(self._ids)}", lora_request=lora
            )
            async with aclosing(outputs):
                async for output in outputs:
                    chunk = answer.chunk(output)
                    if chunk is not None:
                        yield chunk
                        if chunk.finish_reason is not None:  # which may come before vLLM's own end
                            return

    async def sleep(self) -> bool:
        """Free the memory of weights and cache on the device. The process stays; its weights must be read again.

        Returns:
            False if there is no process now.
        """
        self.watch.stop()
        running = self.core.engine
        if running is not None:
            await put_to_sleep(running.llm, self._options.hang_timeout_s)
        return running is not None

    async def wake(self) -> None:
        """Take the memory of the device again; `take_over` then gives the process the weights of an expert.

        Raises:
            EngineError: there is no process any more. vLLM's errors if there is not enough memory.
        """
        running = self.core.engine
        if running is None:
            raise EngineError(f"the engine process of {self.spec.name!r} died")
        await wake_up(running.llm, self._options.hang_timeout_s)

    async def take_over(self, former: VLLMExpert) -> bool:
        """Read this expert's weights into the process of another one with the same shapes, which serves no more.

        Returns:
            False if the other has no process now. After an error the process is ended.
        """
        former.watch.stop()
        running = former.core.release()
        if running is None:
            return False
        running.grammars.close()
        former._preparation.close()
        try:
            await reload_weights(running.llm, self.path, self._options.hang_timeout_s)
            self.core.adopt(await self._describe(running.llm))
        except BaseException as error:
            await asyncio.to_thread(stop, running.llm)
            if isinstance(error, Exception) and not isinstance(error, CoeError):
                raise start_error(self.spec.name, error) from error
            raise
        self.watch.start()
        return True

    async def _start(self) -> Running:
        check = partial(self._parsers.check, expert=self.spec.name)
        llm = await start_in_thread(self.spec.name, self.path, self._options, check)
        try:
            return await self._describe(llm)
        except BaseException:
            await asyncio.to_thread(stop, llm)
            raise

    async def _describe(self, llm: Any) -> Running:
        check = self._checks.check
        most = self._options.max_cpu_loras
        running = await asyncio.to_thread(describe, llm, self.path, self._checker, check, most)
        if self._parsers:
            await asyncio.to_thread(partial(running.parsers.load, self._parsers, expert=self.spec.name))
        await self._check_weights(running)
        return running

    async def _check_weights(self, running: Running) -> None:
        """Raises WeightsError if the weights do not answer as on their first load; EngineError: they do not answer."""
        if self._options.canary == "off":
            return
        try:
            async with asyncio.timeout(self._options.hang_timeout_s):
                answer = await ask_canary(running.llm, self.spec, running.n_ids)
        except TimeoutError as error:
            raise EngineError(
                f"the vLLM process of {self.spec.name!r} did not answer its canary within "
                f"{self._options.hang_timeout_s:g} s (engines.vllm.hang_timeout_s)"
            ) from error
        except Exception as error:
            if not is_dead(error):
                raise
            raise died_after_loading(self.spec) from error
        way, tolerant = way_of_computing(running.llm), self._options.canary == "tolerant"
        await asyncio.to_thread(partial(Canaries().check, self.spec, way, answer, tolerant=tolerant))

    async def _stop(self, running: Running) -> None:
        running.grammars.close()
        await super()._stop(running)


def _prompt(prepared: Prepared) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(prepared.prompt_ids, cache_salt=prepared.salt)


def _params(prepared: Prepared) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    arguments = dict(prepared.sampling)
    if prepared.constraint is not None:
        arguments["structured_outputs"] = StructuredOutputsParams(**prepared.constraint)
    if prepared.stream is not None:
        arguments |= {"detokenize": False, "stop": []}  # the stream does both
    kind = RequestOutputKind.FINAL_ONLY if prepared.is_read_whole else RequestOutputKind.DELTA
    return SamplingParams(**arguments, output_kind=kind)
