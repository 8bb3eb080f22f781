"""The frozen primary of a training: forwards into which a composition reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from coe.engine_config import EnginesConfig
from coe.engines.base import Adapter
from coe.engines.hf.load import LoadedModel
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.latent.decoders import Decoder
from coe.latent.config import LoraConfig
from coe.latent.loading import LoadedExpert
from coe.latent.training.batches import Batch, Predicted
from coe.latent.training.lora import TrainedLora
from registry.spec import ExpertSpec
from registry.store import Snapshot

Update = Callable[[int, Tensor], Tensor]
"""Called with the number of an interaction, from 0, and the hidden states (B, T, d) after its layer; returns what is
added to them, in float32."""


class Primary:
    """A loaded expert whose weights stay as they are, apart from a LoRA adapter if one is trained.

    Args:
        spec: of the expert.
        loaded: the model, or the adapter's base.
        own: the adapter, if the expert is one.
        lora: trains an adapter that takes the place of `own`.
        seed: of that adapter.
        n_slots: adapters that `slots` keeps, `own` among them.

    Attributes:
        slots: of an adapter without `lora`: it is selected, and others of its base can be loaded beside it.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        loaded: LoadedModel,
        own: Adapter | None = None,
        *,
        lora: LoraConfig | None = None,
        seed: int = 0,
        n_slots: int = 1,
    ) -> None:
        self.spec, self.model = spec, loaded.model
        self.decoder = Decoder.of(loaded.model, expert=spec.name)
        self.context_length = min(spec.context_length or loaded.context_length, loaded.context_length)
        base = spec.base or spec.name
        self.lora = None if lora is None else TrainedLora(loaded.model, base, own, lora, seed=seed)
        if own is not None and lora is None:
            self.slots = AdapterSlots(loaded.model, base, n_slots)
            self.slots.select([self.slots.acquire(own)])

    @classmethod
    def open(
        cls,
        spec: ExpertSpec,
        snapshot: Snapshot,
        engines: EnginesConfig,
        *,
        lora: LoraConfig | None = None,
        seed: int = 0,
        n_slots: int = 1,
        find: Callable[[ExpertSpec], Path] | None = None,
    ) -> Primary:
        """Load a registered expert, with the device and type of the hf engine. Blocks.

        Raises:
            WeightsError, OutOfMemory: it cannot be loaded.
            Unsupported: its weights are not here, or its layers are not known (`coe.engines.latent.decoders`).
        """
        expert = LoadedExpert.load(spec, snapshot, engines, find=find)
        return cls(spec, expert.model, expert.adapter, lora=lora, seed=seed, n_slots=n_slots)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def trained(self) -> dict[str, Parameter]:
        """The matrices of the trained adapter; none without one."""
        return {} if self.lora is None else self.lora.parameters()

    def predict(self, batch: Batch, where: Sequence[int] = (), update: Update | None = None) -> Predicted:
        """The answer tokens of a batch, right answers before them given.

        Layers before the first interaction hold no trained tensors, and keep nothing for a backward pass, unless an
        adapter is trained.

        Args:
            where: layers, counted from 1, after which `update` adds to the hidden states.
        """
        with self.reaching(where, update):
            read = self.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        return Predicted(self.head(read.last_hidden_state[batch.predicts]), batch.targets, batch.owners)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, d) states after the final norm -> (N, V) logits in float32."""
        logits: Tensor = self.decoder.head(hidden).float()
        cap = getattr(self.decoder.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @contextmanager
    def reaching(self, where: Sequence[int], update: Update | None) -> Iterator[None]:
        """Within the block, forwards add to the hidden states after these layers."""
        with ExitStack() as stack:
            for q, layer in enumerate(where if update is not None else ()):
                assert update is not None
                hook = partial(_add, partial(update, q))
                stack.callback(self.decoder.at(layer).register_forward_hook(hook).remove)
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within the block, forwards are those of the untouched primary, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.lora is not None:
                stack.enter_context(self.lora.bare())
            yield


def _add(update: Callable[[Tensor], Tensor], _module: Any, _inputs: Any, output: Any) -> Any:
    """A forward hook of a decoder layer. Added in float32, as in serving."""
    hidden = output[0] if isinstance(output, tuple) else output
    changed = (hidden.float() + update(hidden)).to(hidden.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed
