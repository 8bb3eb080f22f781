"""Putting adapters into the layers of a base by peft, and taking the wrapped layers out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coe.engines.hf.lora.adapter_files import AdapterFiles


def inject(model: Any, peft: Any, name: str, files: AdapterFiles) -> Any:
    """Add an adapter to a model; returns its peft model.

    Args:
        model: the base, whose layers are wrapped in place.
        peft: its peft model; None before the first adapter.

    Raises:
        ValueError: weights and layers do not correspond; the adapter is then half there.
    """
    from peft import PeftModelForCausalLM, set_peft_model_state_dict

    with _quiet_peft():
        config = files.peft_config()
        if peft is None:
            peft = PeftModelForCausalLM(model, config, name, autocast_adapter_dtype=False)
        else:
            peft.add_adapter(name, config, autocast_adapter_dtype=False)
        where = {"dtype": model.dtype, "device": model.device}
        weights = {key: tensor.to(**where) for key, tensor in files.low_rank().items()}
        result: Any = set_peft_model_state_dict(peft, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        lost = ", ".join([*missing, *result.unexpected_keys][:3])
        raise ValueError(f"its weights and the base's layers do not correspond, as in {lost}")
    peft.eval()
    peft.requires_grad_(False)
    return peft


def unwrap(model: Any) -> None:
    """Put the base's layers back. (`PeftModel.unload` needs a complete PeftModel.)"""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer):
                setattr(parent, child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def tuner_layers(model: Any) -> list[Any]:
    """The wrapped layers."""
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
