"""The files of a model before vLLM reads them: whether they are whole, and fit a process that runs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from coe.engines.vllm.process import check_folder
from coe.errors import WeightsError
from registry.errors import SourceError
from registry.headers import Tensor, read_json, read_weights

_NAMES: Final = frozenset({"_name_or_path", "transformers_version"})
"""Keys of config.json that describe where a checkpoint comes from."""
_MERGED: Final = ((".gate_proj.", ".up_proj."),)
_KEY_AND_VALUE: Final = (".k_proj.", ".v_proj.")
"""Parts of merged weights. Some models use the keys as values, too, and have no `v_proj`."""
_WEIGHTS: Final = (".weight", ".qweight", ".weight_packed")
logger = logging.getLogger(__name__)


def fits_in_place(name: str, path: Path, former: Path | None) -> bool:
    """Whether a process that serves the folder `former` can take the weights of `path`. Blocks.

    Args:
        name: of the expert in `path`.

    Raises:
        WeightsError: the files in `path` cannot be read, or lack weights, so that no process can serve them.
    """
    check_folder(name, path)
    try:
        wanted = _traits(path)
    except (SourceError, OSError, ValueError) as error:
        raise WeightsError(
            f"{name!r} cannot be loaded: {error}", public=f"expert {name!r} cannot be loaded: its files are damaged"
        ) from error
    check_merged(name, path, wanted[3], wanted[0])
    if former is None or "quantization_config" in wanted[0]:
        return False  # vLLM repacks quantised weights as it loads them
    try:
        return _traits(former) == wanted
    except (SourceError, OSError, ValueError) as error:  # the files of the former expert were deleted
        logger.info("%s cannot be compared with %s: %s", former, path, error)
        return False


def check_merged(name: str, path: Path, tensors: Collection[str], config: Mapping[str, Any]) -> None:
    """Raises WeightsError if parts of merged weights are missing.

    vLLM refuses a checkpoint that lacks a whole parameter. Where it merges two tensors into one parameter and one of
    them is missing, it would answer with what happens to be in memory.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]  # such as `text_config`
    shared = any("k_eq_v" in key for part in parts for key in part)
    pairs = _MERGED if shared else (*_MERGED, _KEY_AND_VALUE)
    missing = sorted(lost for first, second in pairs for lost in _halves(tensors, first, second))
    if missing:
        raise WeightsError(
            f"{name!r}: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}",
            public=f"expert {name!r} cannot be loaded: its files lack weights",
        )


def _halves(tensors: Collection[str], first: str, second: str) -> set[str]:
    """Names that are missing beside tensors of the other kind; none if no tensor is of the first kind."""
    weights = [each for each in tensors if each.endswith(_WEIGHTS)]  # biases and scales may differ
    firsts = {each for each in weights if first in each}
    seconds = {each for each in weights if second in each}
    if not firsts:
        return set()
    expected = {each.replace(first, second) for each in firsts}
    return (expected - seconds) | {each.replace(second, first) for each in seconds - expected}


def _traits(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes, dict[str, tuple[Tensor, str]]]:
    """What a running process depends on: config, generation config, tokenizer, and the shapes and types of tensors."""
    tensors, _ = read_weights(folder)
    generation = folder / "generation_config.json"
    return (
        _without_names(read_json(folder / "config.json")),
        _without_names(read_json(generation)) if generation.exists() else {},
        (folder / "tokenizer.json").read_bytes(),
        {name: (tensor, tensor.dtype) for name, tensor in tensors.items()},
    )


def _without_names(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _NAMES}
