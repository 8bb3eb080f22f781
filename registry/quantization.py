"""Quantised checkpoints: the method that a config states, and the number of weights in packed tensors.

    method              packed tensors                             weights in a stored number
    awq, gptq           `qweight` (int32)                          32 / bits
    compressed-tensors  `weight_packed` (int32)                    32 / num_bits
    bitsandbytes        `weight` (uint8), with `load_in_4bit`      2
    mxfp4               `..._blocks` (uint8)                       2
    fp8 and others      `weight`                                   1

Scales, zero points and orders of columns are no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from registry.headers import Tensor

GGUF: Final = "gguf"
"""Start of the methods of GGUF files, such as `gguf-q4_1`, which are unpacked before an engine loads them."""
_CONFIG_KEYS: Final = ("quantization_config", "compression_config")
_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")
_METHOD: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_NO_WEIGHTS: Final = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_2|qzeros|zeros|zero_point|g_idx|weight_shape|absmax|quant_map|quant_state\..*)$"
)
_INT32: Final = frozenset({"I32", "U32"})
_BYTE: Final = frozenset({"U8", "I8"})
_PACKED: Final = re.compile(r"(^|\.)(qweight|weight_packed)$")


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method that a config.json states, such as `awq`; None for weights that are not quantised."""
    stated = _stated(config)
    if stated is None:
        return None
    method = stated.get("quant_method")
    if isinstance(method, str) and _METHOD.fullmatch(method.lower()):
        return method.lower()
    return "bitsandbytes" if stated.get("load_in_4bit") or stated.get("load_in_8bit") else "unknown"


def weights_in(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, int]:
    """Tensor -> number of weights that it holds, of a quantised checkpoint."""
    stated = _stated(config) or {}
    bits, halves = _bits(stated), bool(stated.get("load_in_4bit")) or stated.get("quant_method") == "mxfp4"
    return {name: _weights(name, tensor, bits, halves) for name, tensor in tensors.items()}


def _weights(name: str, tensor: Tensor, bits: int | None, halves: bool) -> int:
    if _NO_WEIGHTS.search(name):
        return 0
    if bits and tensor.dtype in _INT32 and _PACKED.search(name):
        return tensor.elements * 32 // bits
    return tensor.elements * 2 if halves and tensor.dtype in _BYTE else tensor.elements


def _stated(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section on quantisation, also inside the text part of a multimodal config."""
    parts = [config, *(config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict))]
    found = (part.get(key) for part in parts for key in _CONFIG_KEYS)
    return next((each for each in found if isinstance(each, dict) and each), None)


def _bits(stated: Mapping[str, Any]) -> int | None:
    """Bits of a packed weight; the first group's, where a config has groups."""
    groups = stated.get("config_groups")
    firsts = list(groups.values())[:1] if isinstance(groups, dict) else []
    weights = [first.get("weights") for first in firsts if isinstance(first, dict)]
    places = [stated, *(each for each in weights if isinstance(each, dict))]
    values = (place.get(key) for place in places for key in ("bits", "w_bit", "num_bits"))
    return next((value for value in values if type(value) is int and 1 <= value <= 32), None)
