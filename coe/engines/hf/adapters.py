"""LoRA adapters on a resident base: kept in a limited number of slots, mixed in one batch."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from coe.engines.base import Adapter
from coe.engines.hf.adapter_files import AdapterFiles, read_adapter
from coe.engines.hf.base_parameters import BaseParameters, Replacements
from coe.engines.hf.batch import adapter_key
from coe.engines.hf.mixing import can_mix, mixed
from coe.errors import WeightsError
from registry.lora.plan import is_fused

_BASE: Final = "__base__"  # peft's name for "no adapter" in a mixed batch


@dataclass(frozen=True, slots=True)
class _Slot:
    """A loaded adapter.

    Attributes:
        name: peft's name.
        replacements: parameters that it brings beside its low-rank matrices.
        activated: it acts from its invocation tokens on (aLoRA, arXiv 2504.12397).
        alone: its rows need a batch of their own.
    """

    name: str
    replacements: Replacements
    activated: bool
    alone: bool


class AdapterSlots:
    """The adapters of one base model; only its worker thread calls this.

    An adapter is loaded on first use and kept until its slot is needed: the least recently used one is evicted, never
    one of the current batch. Adapters are identified by content, so a new version under an old name is loaded again.
    Their weights take the base's device and dtype. The base's own tensors are never written.

    Args:
        model: a transformers causal model; peft wraps its layers in place at the first adapter.
        base: the base's name, for error messages.
        n_slots: most adapters resident at once.
    """

    def __init__(self, model: Any, base: str, n_slots: int) -> None:
        self._model = model
        self._base = base
        self._n_slots = n_slots
        self._parameters = BaseParameters(model)
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by key, least recently used first
        self._n_loaded = 0
        self._peft: Any = None
        self._keep: Callable[[Sequence[int]], None] = _one_kind

    def __len__(self) -> int:
        return len(self._slots)

    def acquire(self, adapter: Adapter, in_use: Collection[str] = ()) -> str:
        """Peft's name of the adapter, which is loaded if absent.

        Args:
            in_use: names that must not be evicted.

        Raises:
            WeightsError: the adapter's files are missing, unsafe, or do not fit the base.
        """
        key = adapter_key(adapter)
        if key not in self._slots:
            self._slots[key] = self._load(adapter)
            self._evict({*in_use, self._slots[key].name})
        self._slots.move_to_end(key)
        return self._slots[key].name

    def batches(self, names: Sequence[str | None]) -> list[list[int]]:
        """The rows that can run together, in order: adapters that cannot be mixed have batches of their own."""
        alone = {slot.name for slot in self._slots.values() if slot.alone}
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name if name in alone else None, []).append(row)
        return list(rows.values())

    def generate(self, names: Sequence[str | None], **kwargs: Any) -> None:
        """`model.generate(**kwargs)` with the adapter of each row, `None` for the bare base.

        A batch with one adapter uses peft's plain forward; a mixed one adds each row's update by itself (`mixing`).

        Raises:
            ValueError: these rows cannot run together (`batches`).
        """
        kinds, self._keep = set(names), _one_kind
        if self._peft is None:
            self._model.generate(**kwargs)
        elif kinds == {None}:
            with self._peft.disable_adapter():
                self._model.generate(**kwargs)
        elif len(kinds) == 1:
            self._generate_alone(next(slot for slot in self._slots.values() if slot.name in kinds), len(names), kwargs)
        elif len(self.batches(names)) > 1:
            raise ValueError("an adapter that needs a batch of its own is among others")
        elif can_mix(self._peft, names):
            with mixed(self._peft, names) as rows:
                self._keep = rows.keep
                self._model.generate(**kwargs)
        else:
            by_row = [name or _BASE for name in names]
            self._keep = partial(_keep, by_row)
            self._peft.generate(adapter_names=by_row, **kwargs)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch that `generate` is at work on; the others have left it."""
        self._keep(rows)

    def _generate_alone(self, slot: _Slot, n_rows: int, kwargs: dict[str, Any]) -> None:
        self._peft.set_adapter(slot.name, inference_mode=True)
        with self._parameters.replaced(slot.replacements):
            if not slot.activated:
                self._model.generate(**kwargs)
                return
            from peft.tuners.lora.variants import calculate_alora_offsets

            offsets = calculate_alora_offsets(self._peft.peft_config, slot.name, kwargs["inputs"])
            self._keep = partial(_keep, offsets)
            self._peft.generate(alora_offsets=offsets, **kwargs)

    def _evict(self, in_use: Collection[str]) -> None:
        if len(self._slots) > self._n_slots:
            key = next(key for key, slot in self._slots.items() if slot.name not in in_use)
            self._discard(self._slots.pop(key).name)

    def _load(self, adapter: Adapter) -> _Slot:
        files = read_adapter(adapter, self._base, self._parameters)
        self._n_loaded += 1
        name = f"slot{self._n_loaded}"
        try:
            with _quiet_peft():
                self._inject(name, files)
            replacements = self._parameters.replacements(files.plan, files.tensors)
        except BaseException as error:  # also out of memory: half an adapter must not remain
            self._discard(name)
            if not isinstance(error, ValueError | RuntimeError | KeyError | TypeError):
                raise
            raise WeightsError(
                f"adapter {adapter.spec.name!r} ({adapter.path}) does not fit its base {self._base!r}: {error}"
            ) from error
        config = files.plan.config
        activated, fused = bool(config.alora_invocation_tokens), any(map(is_fused, files.plan.ranks))
        return _Slot(name, replacements, activated, alone=activated or fused or config.use_dora or bool(replacements))

    def _inject(self, name: str, files: AdapterFiles) -> None:
        from peft import PeftModelForCausalLM, set_peft_model_state_dict

        config = files.peft_config()
        if self._peft is None:
            self._peft = PeftModelForCausalLM(self._model, config, name, autocast_adapter_dtype=False)
        else:
            self._peft.add_adapter(name, config, autocast_adapter_dtype=False)
        where = {"dtype": self._model.dtype, "device": self._model.device}
        weights = {key: tensor.to(**where) for key, tensor in files.low_rank().items()}
        result: Any = set_peft_model_state_dict(self._peft, weights, adapter_name=name)
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing or result.unexpected_keys:
            lost = ", ".join([*missing, *result.unexpected_keys][:3])
            raise ValueError(f"its weights and the base's layers do not correspond, as in {lost}")
        self._peft.eval()
        self._peft.requires_grad_(False)

    def _discard(self, name: str) -> None:
        """Remove an adapter, whole or half injected. Without adapters, the model is the bare base again."""
        if not self._slots:
            self._unwrap()
            return
        if name in self._peft.peft_config:
            del self._peft.peft_config[name]
        # peft warns about deleting an active one
        self._peft.set_adapter(next(reversed(self._slots.values())).name, inference_mode=True)
        for layer in _tuner_layers(self._model):
            layer.delete_adapter(name)

    def _unwrap(self) -> None:
        """Put the base's layers back. (`PeftModel.unload` needs a complete PeftModel.)"""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for parent in list(self._model.modules()):
            for child, layer in list(parent.named_children()):
                if isinstance(layer, BaseTunerLayer):
                    setattr(parent, child, layer.get_base_layer())
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._peft = None


def _tuner_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's warnings about what is intended here.

    Adapters of a tied head, and biases where the base has none, cannot be merged; nothing is merged. Patterns that peft
    derives for fused experts match parameters, and peft looks for modules.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def _one_kind(rows: Sequence[int]) -> None:
    """All rows of the batch have the same adapter: nothing has to know which ones stay."""


def _keep(by_row: list[Any], rows: Sequence[int]) -> None:
    """Peft's hooks read this very list at every step."""
    by_row[:] = [by_row[row] for row in rows]
