"""Facts about a model, read from its files: sizes, parameters, context length, architecture, licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.deltas.manifest import is_delta
from registry.documents import parse_document
from registry.errors import InvalidSpec, SourceError
from registry.gguf_header import GgufHeader, read_gguf
from registry.headers import Tensor, read_json, read_weights
from registry.quantization import quantization_of, weights_in

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_USED_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "top_k_experts")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")  # of multimodal models
_MOST_CARD_CHARACTERS = 2**18
_MOST = 10**9  # of a number in a config
_ROUTED_EXPERT = re.compile(r"(^|\.)experts\.|\.ffn_(up|gate|down|gate_up)_exps\.")


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a model. `size_bytes` counts weights only; `context_length` is in tokens.

    `parameters_total` and `parameters_active` count the weights in packed tensors, and no scales. `quantization`: the
    method of the checkpoint, such as `awq` or `gguf-q4_1`.

    `layers`: the stated number of layers; files may have more, such as those that predict further tokens.
    """

    architecture: str
    parameters_total: int
    parameters_active: int
    size_bytes: int
    context_length: int | None
    licence: str | None
    tensors: Mapping[str, Tensor]
    is_gguf: bool
    layers: int | None = None
    quantization: str | None = None


def inspect(path: Path, *, embedding: bool = False) -> Facts:
    """Read the headers of a model: a GGUF file, a folder of safetensors, or a delta, whose facts are what it restores.

    The active parameters of a mixture of experts are those used for one token: shared ones and those of chosen experts.

    Raises:
        SourceError: the files are missing, truncated, damaged, pickled, or of an unsupported architecture.
    """
    return _inspect_folder(path, embedding) if path.is_dir() else _inspect_gguf(path)


def _inspect_gguf(path: Path) -> Facts:
    header = read_gguf(path)
    counts = _elements(header.tensors)
    used, count = header.of_architecture("expert_used_count"), header.of_architecture("expert_count")
    return Facts(
        architecture=header.architecture,
        parameters_total=sum(counts.values()),
        parameters_active=_active(counts, used, count),
        size_bytes=sum(tensor.n_bytes for tensor in header.tensors.values()),
        context_length=header.of_architecture("context_length"),
        licence=_licence_of_gguf(header),
        tensors=header.tensors,
        is_gguf=True,
        layers=header.of_architecture("block_count"),
        quantization=header.quantization,
    )


def _inspect_folder(folder: Path, embedding: bool) -> Facts:
    tensors = _restored_tensors(folder) if is_delta(folder) else read_weights(folder)[0]
    config = read_json(folder / "config.json")
    quantization = quantization_of(config)
    counts = _elements(tensors) if quantization is None else weights_in(tensors, config)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    if not isinstance(architecture, str):
        raise SourceError(f"{folder / 'config.json'} names neither `architectures` nor `model_type`")
    used, count = _number(config, _EXPERTS_USED_KEYS), _number(config, _EXPERT_COUNT_KEYS)
    return Facts(
        architecture=architecture,
        parameters_total=sum(counts.values()),
        parameters_active=_active(counts, used, count),
        size_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        context_length=(_embedding_length(folder) if embedding else None) or _number(config, _CONTEXT_KEYS),
        licence=card_licence(folder),
        tensors=tensors,
        is_gguf=False,
        layers=_number(config, _LAYER_KEYS),
        quantization=quantization,
    )


def _restored_tensors(folder: Path) -> Mapping[str, Tensor]:
    from registry.deltas.restoring import OpenDelta  # with NumPy

    return OpenDelta.open(folder).table


def card_licence(folder: Path) -> str | None:
    """The `license` in the YAML header of a model card (README.md), or `None`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MOST_CARD_CHARACTERS)
    if (top := re.match(r"---\n(.*?)\n---", text, re.DOTALL)) is None:
        return None
    try:
        stated = parse_document(top[1], card).value
    except InvalidSpec:  # cards are written by hand: invalid YAML states no licence
        return None
    licence = stated.get("license") if isinstance(stated, dict) else None
    return licence if isinstance(licence, str) else None


def _licence_of_gguf(header: GgufHeader) -> str | None:
    licence = header.fields.get("general.license")
    return licence if isinstance(licence, str) else None


def _elements(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.elements for name, tensor in tensors.items()}


def _active(counts: Mapping[str, int], used: int | None, count: int | None) -> int:
    """counts: tensor -> its weights. Of `count` routed experts, `used` work on a token."""
    total = sum(counts.values())
    if not used or not count:
        return total
    routed = sum(weights for name, weights in counts.items() if _ROUTED_EXPERT.search(name))
    return total - routed + routed * min(used, count) // count


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first positive integer under these keys, also inside the text part of a multimodal config."""
    parts = [config, *(config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict))]
    values = (part.get(key) for part in parts for key in keys)
    return next((value for value in values if type(value) is int and 0 < value <= _MOST), None)


def _embedding_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    return _number(read_json(path), ("max_seq_length",)) if path.exists() else None
