"""LoRA adapters on a resident base: read safely, kept in a limited number of slots, mixed in one batch."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Adapter
from coe.engines.hf.batch import adapter_key
from coe.engines.hf.mixing import can_mix, mixed
from coe.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_BASE: Final = "__base__"  # peft's name for "no adapter" in a mixed batch
_REFUSED: Final = (
    "bias",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings that change more than the low-rank matrices of a layer: they would affect other rows of a batch."""
_UNUSED: Final[tuple[Any, ...]] = (None, False, "none", [], {})
_HARMLESS_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged; with others the adapter needs a modified base."""


class AdapterSlots:
    """The adapters of one base model; only its worker thread calls this.

    An adapter is loaded on first use and kept until its slot is needed: the least recently used one is evicted, never
    one of the current batch. Adapters are identified by content, so a new version under an old name is loaded again.
    Their weights take the base's device and dtype.

    Args:
        model: a transformers causal model; peft wraps its layers in place at the first adapter.
        base: the base's name, for error messages.
        n_slots: most adapters resident at once.
    """

    def __init__(self, model: Any, base: str, n_slots: int) -> None:
        self._model = model
        self._base = base
        self._n_slots = n_slots
        self._slots: OrderedDict[str, str] = OrderedDict()  # key -> peft's name, least recently used first
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
            config, weights = _read(adapter)
            self._slots[key] = self._inject(adapter, config, weights)
            self._evict({*in_use, self._slots[key]})
        self._slots.move_to_end(key)
        return self._slots[key]

    def generate(self, names: Sequence[str | None], **kwargs: Any) -> None:
        """`model.generate(**kwargs)` with the adapter of each row, `None` for the bare base.

        A batch with one adapter uses peft's plain forward; a mixed one adds each row's update by itself (`mixing`).
        """
        kinds, self._keep = set(names), _one_kind
        if self._peft is None:
            self._model.generate(**kwargs)
        elif kinds == {None}:
            with self._peft.disable_adapter():
                self._model.generate(**kwargs)
        elif len(kinds) == 1:
            self._peft.set_adapter(names[0], inference_mode=True)
            self._model.generate(**kwargs)
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

    def _evict(self, in_use: Collection[str]) -> None:
        if len(self._slots) > self._n_slots:
            key = next(key for key, name in self._slots.items() if name not in in_use)
            self._delete(self._slots.pop(key))

    def _inject(self, adapter: Adapter, config: Any, weights: dict[str, Tensor]) -> str:
        from peft import PeftModelForCausalLM, set_peft_model_state_dict

        self._n_loaded += 1
        name = f"slot{self._n_loaded}"
        where = {"dtype": self._model.dtype, "device": self._model.device}
        try:
            if self._peft is None:
                self._peft = PeftModelForCausalLM(self._model, config, name, autocast_adapter_dtype=False)
            else:
                self._peft.add_adapter(name, config, autocast_adapter_dtype=False)
            weights = {key: tensor.to(**where) for key, tensor in weights.items()}
            result: Any = set_peft_model_state_dict(self._peft, weights, adapter_name=name)
            missing = [key for key in result.missing_keys if f".{name}." in key]
            if missing or result.unexpected_keys:
                lost = ", ".join([*missing, *result.unexpected_keys][:3])
                raise ValueError(f"its weights and the base's layers do not correspond, as in {lost}")
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self._discard(name)
            raise WeightsError(
                f"adapter {adapter.spec.name!r} ({adapter.path}) does not fit its base {self._base!r}: {error}"
            ) from error
        self._peft.eval()
        self._peft.requires_grad_(False)
        return name

    def _discard(self, name: str) -> None:
        """Undo a failed injection. A peft model needs an adapter, so the first one takes peft with it."""
        if self._peft is None or name not in self._peft.peft_config:
            return
        if self._slots:
            self._delete(name)
        else:
            self._peft.unload()
            self._peft = None

    def _delete(self, name: str) -> None:
        """Delete one of several adapters; another is activated first, since peft warns about deleting an active one."""
        self._peft.set_adapter(next(reversed(self._slots.values())), inference_mode=True)
        self._peft.delete_adapter(name)


def _one_kind(rows: Sequence[int]) -> None:
    """All rows of the batch have the same adapter: nothing has to know which ones stay."""


def _keep(by_row: list[str], rows: Sequence[int]) -> None:
    """Peft's hooks read this very list at every step."""
    by_row[:] = [by_row[row] for row in rows]


def _read(adapter: Adapter) -> tuple[Any, dict[str, Tensor]]:
    """The config and weights of an adapter's folder: JSON and safetensors; no pickle, and no code is run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"adapter {adapter.spec.name!r} ({adapter.path})"
    for file in (CONFIG, WEIGHTS):
        if not (adapter.path / file).is_file():
            raise WeightsError(f"{where} has no {file}: only LoRA adapters in safetensors can be loaded")
    try:
        config = _read_config(adapter)
        weights = load_file(adapter.path / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{where} cannot be read: {error}") from error
    broken = next((key for key, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise WeightsError(f"{where} has weights that are not finite numbers, in {broken}")
    return config, weights


def _read_config(adapter: Adapter) -> Any:
    from peft import LoraConfig

    stated = json.loads((adapter.path / CONFIG).read_text(encoding="utf-8"))
    kind = stated.get("peft_type") if isinstance(stated, dict) else None
    if kind != "LORA":
        raise ValueError(f"{CONFIG} is of peft_type {kind!r}, and only LORA is supported")
    config = LoraConfig.from_pretrained(str(adapter.path), inference_mode=True)
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    used = [name for name in (*_REFUSED, *variants) if getattr(config, name, None) not in _UNUSED]
    if used:
        raise ValueError(f"{CONFIG} sets {', '.join(used)}, which an adapter in a mixed batch cannot have")
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise ValueError(
            f"it was trained with init_lora_weights={config.init_lora_weights!r}, which modifies the base: convert it "
            "to a plain LoRA adapter (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    config.init_lora_weights = False  # all weights are set after this
    return config
