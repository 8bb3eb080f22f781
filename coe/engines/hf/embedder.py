"""HFEmbedder: a sentence-transformers model as an expert that returns vectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from coe.engines.base import Adapter
from coe.engines.embedding import Vectors, token_rows, vectors_chunk
from coe.engines.embedding_folder import read_modules
from coe.engines.hf.load import translate
from coe.engines.hf.private_weights import private_weights
from coe.errors import EngineError, WeightsError
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MOST_TOKENS: Final = 16_384
"""Tokens of one batch, padding included, unless one input has more."""


class HFEmbedder:
    """Resident weights that embed texts: pooling and normalisation are those that the model's `modules.json` states.

    Inputs are read in batches of similar lengths. Requests take turns between batches, and one that is closed ends
    after its current batch.

    Args:
        model: a SentenceTransformer.
        max_batch: inputs of one batch.
    """

    def __init__(self, spec: ExpertSpec, model: Any, *, max_batch: int) -> None:
        self.spec, self.capacity = spec, max_batch
        self._model, self._max_batch = model, max_batch
        stated = (model.max_seq_length, spec.context_length)
        self._most = min((each for each in stated if each), default=None)
        # a tokenizer may have more tokens; on a GPU, one without a row would end the process
        self._n_ids: int = model[0].auto_model.get_input_embeddings().weight.shape[0]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"hf:{spec.name}")

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield one chunk with the vectors of all inputs; see `Expert.generate`.

        Raises:
            Rejected: an input has no tokens, too many, or one that the vocabulary does not have.
        """
        rows = await self._run(lambda: self._rows(request))
        vectors: Vectors | None = None
        for batch in batches([len(row) for row in rows], self._max_batch):
            made = await self._run(lambda batch=batch: self._embed([rows[i] for i in batch]))  # type: ignore[misc]
            if vectors is None:
                vectors = np.empty((len(rows), made.shape[1]), np.float32)
            vectors[batch] = made
        assert vectors is not None  # a request has inputs
        yield vectors_chunk(vectors, sum(map(len, rows)))

    async def close(self) -> None:
        """Wait for the current batch, and free the memory."""
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None

    async def _run(self, work: Callable[[], T]) -> T:
        """Run in the thread of the model, whose tokenizer no two threads may use."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:
            if self._model is None:
                raise EngineError(f"{self.spec.name!r} was unloaded: load it again") from error
            raise

    def _rows(self, request: GenerateRequest) -> list[list[int]]:
        return token_rows(self._model.tokenizer, request, most=self._most, n_ids=self._n_ids, expert=self.spec.name)

    def _embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """(n_rows, dim) vectors of tokens."""
        import torch

        with translate(f"{self.spec.name!r} failed", EngineError), torch.inference_mode():
            longest, pad = max(map(len, rows)), self._model.tokenizer.pad_token_id or 0
            ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])  # (n_rows, longest)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            inputs = {"input_ids": ids.to(self._model.device), "attention_mask": mask.to(self._model.device)}
            made = self._model(inputs)["sentence_embedding"].float().cpu().numpy()
        vectors: Vectors = made
        return vectors


def batches(lengths: Sequence[int], most_rows: int, most_tokens: int = MOST_TOKENS) -> Iterator[list[int]]:
    """Rows of similar lengths: positions in batches of at most so many rows, and so many tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        # the first row of a batch is its longest
        if batch and (len(batch) == most_rows or lengths[batch[0]] * (len(batch) + 1) > most_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def load_embedder(name: str, path: Path, device: str, dtype: torch.dtype) -> Any:
    """A SentenceTransformer from local files: safetensors, no code from the folder.

    Raises:
        WeightsError: files missing, damaged, or of modules that are not supported.
        OutOfMemory: memory ran out while loading.
    """
    read_modules(name, path)
    with translate(f"{name!r} cannot be loaded from {path}", WeightsError), private_weights():
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(
            str(path),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        )
        return model.eval().requires_grad_(False)
