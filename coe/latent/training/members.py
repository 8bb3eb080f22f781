"""The members of a composition in memory, all frozen: what each reads, its hidden states, and its logits with notes.

Members on one base share its weights. A forward is that of transformers; hooks take the states of layers, or add to
them, and the head reads only the positions that predict the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coe.engine_config import EnginesConfig
from coe.engines import chat
from coe.engines.base import Adapter
from coe.engines.hf.load import LoadedModel
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.latent.decoders import Decoder
from coe.engines.latent.spans import UserText, no_spans
from coe.engines.latent.text_ends import TextEnds
from coe.engines.render import Renderer
from coe.errors import ContextLengthExceeded, Rejected, Unsupported
from coe.experts import locator
from coe.latent.loading import LoadedExpert
from coe.latent.training.checks import base_of
from coe.latent.training.trainer import OnLoading
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

Hook = Callable[[Tensor], Tensor | None]
"""Called with the output (rows, T, d) of a layer; what it returns takes its place."""


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """A prompt and its answer as one member reads them: n tokens.

    Attributes:
        ids: of the rendered prompt and the answer, without the token that ends it.
        end: the token that ends the answer.
        n_prompt: tokens of the prompt.
        spans: (n, 2) characters of the user's text, and behind them those of the answer; -1 for the template.
        given, read: (n,) ends in the answer's text (`TextEnds`); 0 and -1 for tokens of the prompt.
    """

    ids: tuple[int, ...]
    end: int
    n_prompt: int
    spans: NDArray[np.int32]
    given: NDArray[np.int64]
    read: NDArray[np.int64]

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens to predict: those of the answer, and the one that ends it."""
        return (*self.ids[self.n_prompt :], self.end)


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """A model in memory, with the adapters of the members on it."""

    loaded: LoadedModel
    slots: AdapterSlots
    decoder: Decoder


class Member:
    """One member: a model, or an adapter on one. One thread at a time.

    Args:
        spec: of the expert. weights: the model, or the adapter's base.
        adapter: the adapter, if the expert is one.
        renderer: renders its chat template.

    Raises:
        WeightsError: the adapter does not fit. Unsupported: it acts from its invocation tokens on (aLoRA).
    """

    def __init__(self, spec: ExpertSpec, weights: Weights, adapter: Adapter | None, renderer: Renderer) -> None:
        self.spec, self._weights, self._renderer = spec, weights, renderer
        self.name, self.decoder = spec.name, weights.decoder
        self._slot = weights.slots.acquire(adapter) if adapter else None
        if self._slot is not None and weights.slots.has_activated([self._slot]):
            raise Unsupported(f"{self.name!r} acts from its invocation tokens on (aLoRA): it cannot be a member here")
        self._style = chat.ChatStyle.read(adapter.path) if adapter else chat.ChatStyle()
        loaded = weights.loaded
        own = sorted(chat.token_ids(loaded.tokenizer, self._style.eos))
        self._end = own[0] if own else loaded.tokenizer.eos_token_id
        if self._end is None:
            self._end = min(loaded.eos)
        self.context_length = min(spec.context_length or loaded.context_length, loaded.context_length)

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""
        return self._weights.loaded.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self._weights.loaded.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and states."""
        dtype: torch.dtype = self._weights.loaded.model.dtype
        return dtype

    def reading(self, prompt: str, answer: str) -> Reading:
        """A user message and its answer as this member reads them.

        Raises:
            ContextLengthExceeded: they do not fit its context.
            Rejected: its chat template rejects the message, the answer has no token, or a text is much too long.
            Unsupported: its tokenizer does not state which characters its tokens stand for.
        """
        tokenizer, request = self._weights.loaded.tokenizer, GenerateRequest(messages=(Message("user", prompt),))
        text = chat.render(tokenizer, request, self._renderer, self._style, expert=self.name).result()
        for each in (text, answer):
            chat.check_length(tokenizer, each, self.context_length, expert=self.name)
        ids = chat.encode_text(tokenizer, text, expert=self.name)
        answer_ids: list[int] = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if not answer_ids:
            raise Rejected(f"the answer has no token for {self.name!r}: give a longer one")
        if len(ids) + len(answer_ids) + 1 > self.context_length:
            raise ContextLengthExceeded(
                self.name,
                prompt_tokens=len(ids),
                max_tokens=len(answer_ids) + 1,
                context_length=self.context_length,
            )
        user = UserText.find(text, request)
        spans = no_spans(len(ids)) if user is None else user.spans(tokenizer, text, len(ids))
        ends = TextEnds.of(tokenizer, answer_ids, answer)
        return Reading(
            ids=(*ids, *answer_ids),
            end=self._end,
            n_prompt=len(ids),
            spans=np.concatenate([spans, ends.spans(len(prompt))]),
            given=np.concatenate([np.zeros(len(ids), np.int64), ends.given]),
            # A token of no character still belongs to the answer.
            read=np.concatenate([np.full(len(ids), -1), ends.read.clip(min=1)]),
        )

    def logits(self, readings: Sequence[Reading], hooks: Mapping[int, Hook] | None = None) -> Tensor:
        """(N, V) logits of the answers' tokens and their ends (`Reading.targets`), rows one after the other.

        Args:
            hooks: by decoder layer, counted from 1.
        """
        model, width = self._weights.loaded.model, max(len(each.ids) for each in readings)
        pad = self._end
        ids = torch.tensor([[*each.ids, *[pad] * (width - len(each.ids))] for each in readings], device=self.device)
        places = torch.arange(width, device=self.device)
        lengths = torch.tensor([[len(each.ids)] for each in readings], device=self.device)
        first = torch.tensor([[each.n_prompt - 1] for each in readings], device=self.device)
        real = places < lengths
        self._weights.slots.select([self._slot] * len(readings))
        with _hooked(self.decoder, hooks or {}), _head_at(self.decoder.head, real & (places >= first)):
            logits: Tensor = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[0]
        return logits

    def states(self, readings: Sequence[Reading], layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Hidden states (J, n, d) of each reading after J layers, on the CPU, and `logits` without notes."""
        with torch.no_grad(), self.decoder.states(layers) as found:
            logits = self.logits(readings)
            stacked = torch.stack([found[layer] for layer in layers], 1).cpu()
        return [row[:, : len(each.ids)].clone() for row, each in zip(stacked, readings, strict=True)], logits


class Members:
    """All members of a composition, by position. Use as a context manager: it renders in processes of its own.

    Args:
        names: registered experts.
        engines: device and type are those of its hf engine.
        find: folder of verified files.

    Raises:
        Unsupported: a member's layers are not known, with the list of architectures, or it is an aLoRA.
        WeightsError, OutOfMemory: a member cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        snapshot: Snapshot,
        engines: EnginesConfig,
        *,
        find: Callable[[ExpertSpec], Path] | None = None,
        on_loading: OnLoading = lambda name: None,
    ) -> None:
        self._renderer = Renderer()
        try:
            found = find or locator(snapshot.experts)
            self._members = list(self._load(names, snapshot, engines, found, on_loading))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, position: int) -> Member:
        return self._members[position]

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that render; weights are freed with this object."""
        self._renderer.close()

    def _load(
        self,
        names: Sequence[str],
        snapshot: Snapshot,
        engines: EnginesConfig,
        find: Callable[[ExpertSpec], Path],
        on_loading: OnLoading,
    ) -> Iterator[Member]:
        weights: dict[str, Weights] = {}
        for name in names:
            on_loading(name)
            spec = snapshot.experts[name]
            base = base_of(spec, snapshot)
            if base.name not in weights:
                loaded = LoadedExpert.load(base, snapshot, engines, find=find).model
                slots = AdapterSlots(loaded.model, base.name, len(names))
                weights[base.name] = Weights(loaded, slots, Decoder.of(loaded.model, expert=base.name))
            adapter = Adapter(spec, find(spec)) if spec.kind is Kind.ADAPTER else None
            yield Member(spec, weights[base.name], adapter, self._renderer)


@contextmanager
def _hooked(decoder: Decoder, hooks: Mapping[int, Hook]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            stack.callback(decoder.at(layer).register_forward_hook(_of_output(hook)).remove)
        yield


def _of_output(hook: Hook) -> Callable[[Any, Any, Any], Any]:
    """A forward hook: some decoder layers return a tuple."""

    def called(_: Any, __: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(output)
        changed = hook(output[0])
        return None if changed is None else (changed, *output[1:])

    return called


@contextmanager
def _head_at(head: Any, places: Tensor) -> Iterator[None]:
    """The head reads only the positions (rows, T) that are true, as one row (1, N, d)."""
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][places][None],))
    try:
        yield
    finally:
        handle.remove()
