"""Hidden states of any expert with weights here, for texts, at layers and places.

    with StateReader.open("sentiment", snapshot, config.engines) as reader:
        prompts = reader.tokens([Prompt("The film was lovely.")])
        states = reader.read(prompts, layers=(15, 30), places=("last", "mean"))      # .values: (n, places, layers, d)
        for one in reader.each(prompts, layers=(30,)): ...                            # .states: (layers, tokens, d)

The model is loaded and the adapter applied by the code of the hf engine. Layers count from 1, the output of the first
decoder layer; 0 is what the head reads, after the final norm. Prompts run in batches of similar length, left-padded as
in the engine; in float32 a prompt has the same states alone and in a batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from coe.engine_config import EnginesConfig
from coe.engines import chat
from coe.engines.hf.load import translate
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.latent.decoders import Decoder
from coe.engines.render import Renderer
from coe.errors import ContextLengthExceeded, EngineError, Rejected, UnknownModel
from coe.latent.by_length import TOKENS_AT_ONCE, batches
from coe.latent.loading import LoadedExpert
from coe.latent.prompts import Prompt, PromptEncoder, PromptTokens
from registry.errors import UnknownExpert
from registry.spec import ExpertSpec
from registry.store import Snapshot

Place = Literal["last", "span", "mean"]
"""The last prompt token, where the expert is about to answer; the last token of the prompt's span; the mean of all."""
PLACES: Final[tuple[Place, ...]] = ("last", "span", "mean")
MOST_PROMPT_TOKENS: Final = 16_384
"""Tokens of one prompt."""
MOST_TOKENS: Final = 2_000_000
"""Tokens of the prompts of one call of `tokens`."""
MOST_BYTES: Final = 2**30
"""Size of the states that `read` returns."""

_ENCODED_AT_ONCE: Final = 256

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (prompts read, prompts in all)."""


@dataclass(frozen=True, eq=False, slots=True)
class PromptStates:
    """What one prompt left in the expert.

    Attributes:
        row: position among the prompts.
        states: (layers, tokens, d) of the prompt.
        answer: the expert's greedy answer, up to the tokens that were asked for.
    """

    row: int
    states: Floats
    answer: str


@dataclass(frozen=True, eq=False, slots=True)
class States:
    """States at places.

    Attributes:
        values: (n, places, layers, d).
        answers: (n,) greedy answers; empty texts if none were asked for.
    """

    values: Floats
    places: tuple[Place, ...]
    layers: tuple[int, ...]
    answers: tuple[str, ...]

    def at(self, place: Place, layer: int) -> Floats:
        """(n, d) of one place and layer."""
        return self.values[:, self.places.index(place), self.layers.index(layer)]


class StateReader:
    """Reads the states of one expert. Use as a context manager: it holds weights. One thread at a time.

    Args:
        raw: prompts are read as they are; else as one user message, with the expert's chat template.
    """

    def __init__(self, expert: LoadedExpert, *, raw: bool = False) -> None:
        spec, model, adapter = expert.spec, expert.model, expert.adapter
        self.spec, self.raw = spec, raw
        self._loaded, self._adapter = model, adapter
        self._decoder = Decoder.of(model.model, expert=spec.name)
        self._slots = AdapterSlots(model.model, spec.base or spec.name, 1)
        style = chat.ChatStyle.read(adapter.path) if adapter else chat.ChatStyle()
        self._renderer = None if raw else Renderer()
        self._ends = model.eos | chat.token_ids(model.tokenizer, style.eos)
        self.context_length = min(spec.context_length or model.context_length, model.context_length)
        most = min(self.context_length, MOST_PROMPT_TOKENS)
        self._encoder = PromptEncoder(model.tokenizer, spec.name, style, self._renderer, most)

    @classmethod
    def open(
        cls,
        name: str,
        snapshot: Snapshot,
        engines: EnginesConfig | None = None,
        *,
        raw: bool = False,
        find: Callable[[ExpertSpec], Path] | None = None,
    ) -> Self:
        """Load a registered expert. Blocks.

        Args:
            engines: device and dtype are those of the hf engine.
            find: verified files, as for `LoadedExpert.load`.

        Raises:
            UnknownModel: it is not registered. Unsupported: its weights are not here, or of another architecture.
            WeightsError, OutOfMemory: it cannot be loaded.
        """
        if (spec := snapshot.experts.get(name)) is None:
            raise UnknownModel(str(UnknownExpert(name, snapshot.experts)))
        return cls(LoadedExpert.load(spec, snapshot, engines or EnginesConfig(), find=find), raw=raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that render templates. The weights are freed with this object."""
        if self._renderer is not None:
            self._renderer.close()

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self._decoder.n_layers

    @property
    def width(self) -> int:
        """Width d of the states."""
        return self._decoder.width

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self._loaded.tokenizer

    def tokens(self, prompts: Sequence[Prompt], *, answer_tokens: int = 0) -> list[PromptTokens]:
        """The prompts as the expert reads them. Chat templates render in processes of their own.

        Args:
            answer_tokens: room for an answer in the context.

        Raises:
            ContextLengthExceeded: a prompt does not fit the expert's context. Rejected: it cannot be read.
        """
        encoded: list[PromptTokens] = []
        total = 0
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            some = self._encoder.encode(prompts[start : start + _ENCODED_AT_ONCE])
            self._check_lengths(some, answer_tokens)
            total += sum(len(one.ids) for one in some)
            if total > MOST_TOKENS:
                raise Rejected(f"the prompts have more than {MOST_TOKENS:,} tokens: read fewer rows (--limit)")
            encoded += some
        return encoded

    def _check_lengths(self, prompts: Sequence[PromptTokens], answer_tokens: int) -> None:
        for one in prompts:
            n = len(one.ids)
            if n + answer_tokens > self.context_length:
                error = ContextLengthExceeded(
                    self.spec.name, prompt_tokens=n, max_tokens=answer_tokens, context_length=self.context_length
                )
                error.args = (f"{one.prompt.name}: {error}",)
                raise error
            if n > MOST_PROMPT_TOKENS:
                raise Rejected(
                    f"{one.prompt.name}: it has {n:,} tokens; states of up to {MOST_PROMPT_TOKENS:,} are read"
                )

    def read(
        self,
        prompts: Sequence[PromptTokens],
        layers: Sequence[int],
        places: Sequence[Place] = ("last",),
        *,
        answer_tokens: int = 0,
        on_progress: Progress | None = None,
    ) -> States:
        """The states of all prompts at places, as float32 on the CPU.

        Args:
            layers: from 1 to `n_layers`; 0 is what the head reads.
            answer_tokens: most tokens of the greedy answers to return; 0 returns none.

        Raises:
            Rejected: no such layer, a prompt without the span that a place needs, or the states exceed MOST_BYTES.
            EngineError, OutOfMemory: the model failed.
        """
        shape = (len(prompts), len(places), len(layers), self.width)
        if (size := 4 * int(np.prod(shape, dtype=np.int64))) > MOST_BYTES:
            raise Rejected(
                f"the states take {size / 2**20:,.0f} MiB, more than {MOST_BYTES // 2**20:,}: read fewer prompts, "
                "layers or places"
            )
        spans = [one.last_of_span() if "span" in places else 0 for one in prompts]
        values, answers = np.empty(shape, np.float32), [""] * len(prompts)
        for done, one in enumerate(self.each(prompts, layers, answer_tokens=answer_tokens), 1):
            at: Mapping[Place, Callable[[Floats], Floats]] = {
                "last": lambda states: states[:, -1],
                "span": lambda states, i=spans[one.row]: states[:, i],  # type: ignore[misc]
                "mean": lambda states: states.mean(1),
            }
            values[one.row] = [at[place](one.states) for place in places]
            answers[one.row] = one.answer
            if on_progress is not None:
                on_progress(done, len(prompts))
        return States(values, tuple(places), tuple(layers), tuple(answers))

    def each(
        self, prompts: Sequence[PromptTokens], layers: Sequence[int], *, answer_tokens: int = 0
    ) -> Iterator[PromptStates]:
        """The states of all tokens of each prompt, the longest prompts first; memory holds one batch.

        Args, Raises: as `read`.
        """
        for layer in layers:
            if not 0 <= layer <= self.n_layers:
                raise Rejected(f"{self.spec.name!r} has layers 1 to {self.n_layers}; there is no layer {layer}")
        for rows in batches([len(one.ids) + answer_tokens for one in prompts], most_tokens=TOKENS_AT_ONCE):
            with translate(f"{self.spec.name!r} failed while reading prompts", EngineError):
                batch = self._forward([prompts[row].ids for row in rows], layers, answer_tokens)
            for row, states, answer in zip(rows, *batch, strict=True):
                yield PromptStates(row, states, answer)

    def _forward(self, ids: list[list[int]], layers: Sequence[int], n_answer: int) -> tuple[list[Floats], list[str]]:
        """States (layers, tokens, d) and answers of a batch."""
        import torch

        model, pad, width = self._loaded.model, min(self._loaded.eos, default=0), max(map(len, ids))
        gaps = [width - len(row) for row in ids]
        tokens = torch.tensor([[pad] * gap + row for gap, row in zip(gaps, ids, strict=True)], device=model.device)
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=model.device)
        name = self._slots.acquire(self._adapter) if self._adapter else None
        with torch.inference_mode(), self._decoder.states(layers) as found:
            # One token is the least that `generate` makes; its head reads only the last position.
            written = self._slots.generate(
                [name] * len(ids),
                inputs=tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(1, n_answer),
                eos_token_id=sorted(self._ends) or None,
                pad_token_id=pad,
            )
            hidden = [found[layer].float().cpu().numpy() for layer in layers]
        states = [np.stack([layer[row, gap:] for layer in hidden]) for row, gap in enumerate(gaps)]
        if not all(np.isfinite(each).all() for each in states):
            raise EngineError(
                f"the hidden states of {self.spec.name!r} are not finite: its weights are damaged, or too large for "
                "the dtype of the engine"
            )
        return states, [self._text(row) if n_answer else "" for row in written[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        text: str = self._loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text
