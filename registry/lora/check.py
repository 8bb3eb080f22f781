"""Check that the files of a LoRA adapter can be used on its base, before anything loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from registry.deltas.cache import restored_adapter
from registry.errors import SourceError
from registry.headers import Tensor, read_adapter_weights
from registry.inspection import Facts
from registry.lora.base import base_weights
from registry.lora.config import read_lora_config
from registry.lora.plan import LoraPlan, differs, plan_lora
from registry.lora.tensors import all_finite, equal


def read_lora(folder: Path, base_name: str, base: Facts) -> dict[str, Tensor]:
    """The tensors of an adapter that an engine can serve on `base`.

    Raises:
        SourceError: it is not LoRA or damaged, does not fit the base, changes weights of the base, or needs what no
            engine supports.
    """
    config = read_lora_config(folder)
    tensors = read_adapter_weights(restored_adapter(folder))
    try:
        weights = base_weights(base)
        plan = plan_lora(config, {name: tensor.shape for name, tensor in tensors.items()}, weights)
        for name, own in plan.same.items():
            if not equal(tensors[name], base.tensors[weights.stored(own)]):
                raise differs(name, own, base.is_gguf)
        _check_finite(tensors, plan.loaded | plan.replaced | dict.fromkeys(plan.rows, ""))
    except SourceError as error:
        raise SourceError(f"adapter {folder} does not fit its base {base_name!r}: {error}") from error
    return tensors


def plan_of(folder: Path, base: Facts) -> LoraPlan:
    """What an adapter changes on its base, from headers alone. Raises SourceError if it does not fit."""
    shapes = {name: tensor.shape for name, tensor in read_adapter_weights(restored_adapter(folder)).items()}
    return plan_lora(read_lora_config(folder), shapes, base_weights(base))


def _check_finite(tensors: Mapping[str, Tensor], used: Mapping[str, str]) -> None:
    for name in used:
        if not all_finite(tensors[name]):
            raise SourceError(f"{name} has values that are not finite numbers")
