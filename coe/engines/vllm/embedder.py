"""VLLMEmbedder: an embedding model in one vLLM engine process, which runs vLLM's pooling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np

from coe.engines.base import Adapter, ShapeKey
from coe.engines.embedding import Vectors, token_rows, vectors_chunk
from coe.engines.embedding_folder import read_modules
from coe.engines.vllm.errors import is_dead, lost, request_error
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import stop
from coe.engines.vllm.starting import start_in_thread
from coe.engines.vllm.supervised import ATTEMPTS, Supervised
from coe.errors import WeightsError
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

_WAYS: Final = {"cls_token": "CLS", "mean_tokens": "MEAN", "lasttoken": "LAST"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """A started engine.

    Attributes:
        llm: vLLM's AsyncLLM.
        tokenizer: of transformers.
        n_ids: token ids of the model.
        most: tokens that it reads of one input.
    """

    llm: Any
    tokenizer: Any
    n_ids: int
    most: int


class VLLMEmbedder(Supervised[Pooling]):
    """A model whose vectors vLLM computes: pooling and normalisation are those that its `modules.json` states.

    Args:
        spec: the expert.
        path: folder of the model.
        options: of the engine.
    """

    def __init__(self, spec: ExpertSpec, path: Path, options: Options) -> None:
        super().__init__(spec, options)
        self._path, self._options = path, options.for_embeddings()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"vllm:{spec.name}")
        self._ids = count(1)

    async def close(self) -> None:
        """See `Supervised.close`."""
        await super().close()
        self._thread.shutdown(wait=False)

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield one chunk with the vectors of all inputs; see `Expert.generate`.

        Raises:
            Rejected: an input has no tokens, too many, or one that the vocabulary does not have.
            EngineLost: the process died twice.
        """
        for attempt in range(ATTEMPTS):
            running = await self.core.live()
            try:
                chunk = await self._embed(running, request)
            except Exception as error:
                if not is_dead(error):
                    raise request_error(self.spec.name, error) from error
                self.core.lost(running)
                if attempt == ATTEMPTS - 1:
                    raise lost(self.spec.name, shown=False) from error
                continue
            yield chunk
            return

    async def _embed(self, running: Pooling, request: GenerateRequest) -> Chunk:
        read = partial(
            token_rows, running.tokenizer, request, most=running.most, n_ids=running.n_ids, expert=self.spec.name
        )
        rows = await asyncio.get_running_loop().run_in_executor(self._thread, read)
        places = asyncio.Semaphore(self.capacity)  # so that a request does not fill vLLM's queue for others
        tasks = [asyncio.ensure_future(self._vector(running, row, places)) for row in rows]
        try:
            vectors = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return vectors_chunk(np.stack(vectors), sum(map(len, rows)))

    async def _vector(self, running: Pooling, row: Sequence[int], places: asyncio.Semaphore) -> Vectors:
        from vllm.inputs import tokens_input
        from vllm.pooling_params import PoolingParams

        found = None
        async with places:
            prompt = tokens_input(list(row), cache_salt=self.spec.digest or self.spec.ref)
            outputs = running.llm.encode(prompt, PoolingParams(task="embed"), f"coe-{next(self._ids)}")
            async with aclosing(outputs):
                async for output in outputs:
                    found = output.outputs.data
        assert found is not None  # vLLM yields the vector, or raises
        vector: Vectors = found.float().cpu().numpy()
        return vector

    async def _start(self) -> Pooling:
        pooling = await asyncio.to_thread(pooling_of, self.spec.name, self._path)
        llm = await start_in_thread(self.spec.name, self._path, self._options)
        try:
            return await asyncio.to_thread(self._describe, llm, pooling)
        except BaseException:
            await asyncio.to_thread(stop, llm)
            raise

    def _describe(self, llm: Any, pooling: tuple[str, bool]) -> Pooling:
        from transformers import AutoTokenizer

        found = llm.model_config.pooler_config
        if (found.seq_pooling_type, bool(found.use_activation)) != pooling:
            raise WeightsError(
                f"vLLM does not pool {self.spec.name!r} as its modules.json states ({found.seq_pooling_type}, not "
                f"{pooling[0]}, or not normalised alike): register it with `engine: hf`"
            )
        tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
        config = llm.model_config
        limits = (config.max_model_len, self.spec.context_length)
        return Pooling(llm, tokenizer, config.get_vocab_size(), min(each for each in limits if each))


def pooling_of(name: str, path: Path) -> tuple[str, bool]:
    """How the model in `path` pools, in vLLM's words, and whether vectors have length 1.

    Raises:
        WeightsError: in a way that vLLM does not have. It would pool otherwise, and go on.
    """
    modules = read_modules(name, path)
    way = _WAYS.get(modules.pooling[0]) if len(modules.pooling) == 1 else None
    if way is None or modules.dense:
        what = "projections (Dense)" if modules.dense else f"pooling by {' and '.join(modules.pooling)}"
        raise WeightsError(f"{name!r} has {what}, which engine 'vllm' does not serve: register it with `engine: hf`")
    return way, modules.normalize


class EmbedderSlot:
    """A slot of one embedding model; see `coe.engines.base.Slot`. Another model is another process.

    Args:
        options: of the engine.
    """

    def __init__(self, shape: ShapeKey, options: Options) -> None:
        self.shape = shape
        self.expert: VLLMEmbedder | None = None
        self._options = options

    async def switch(self, spec: ExpertSpec, path: Path) -> VLLMEmbedder:
        """End the former process, and start that of the model."""
        await self.close()
        expert = VLLMEmbedder(spec, path, self._options)
        await expert.open()
        self.expert = expert
        return expert

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """Nothing: embedding models are small."""
        return 0

    async def park(self) -> bool:
        """End the process."""
        await self.close()
        return False

    async def unpark(self) -> None:
        """Nothing: the slot is empty."""

    async def close(self) -> None:
        """End the process."""
        expert, self.expert = self.expert, None
        if expert is not None:
            await expert.close()
