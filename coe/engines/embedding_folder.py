"""The folder of an embedding model, as sentence-transformers saves it: how it pools, and what is safe to load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coe.errors import WeightsError
from registry.errors import SourceError
from registry.headers import check_regular, read_json
from registry.json_text import loads

_MOST_BYTES: Final = 2**20
_KINDS: Final = frozenset({"Transformer", "Pooling", "Dense", "Normalize"})
"""Modules of sentence-transformers that are loaded; others may read further files, or run code."""
_ARGUMENTS: Final = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")
_MODE: Final = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Modules:
    """What follows the transformer of an embedding model.

    Attributes:
        pooling: the ways of pooling, side by side: `cls_token`, `mean_tokens`, `lasttoken` and others.
        dense: whether there are projections.
        normalize: whether vectors have length 1.
    """

    pooling: tuple[str, ...]
    dense: bool
    normalize: bool


def read_modules(name: str, path: Path) -> Modules:
    """Read and check the settings of an embedding model.

    Args:
        name: of the expert.

    Raises:
        WeightsError: the folder is no sentence-transformers model, or has settings that could run code.
    """
    if not (path / "modules.json").is_file():
        raise WeightsError(
            f"{name!r}: {path} has no modules.json, which states how an embedding model pools: save it with "
            "sentence-transformers"
        )
    try:
        modules = list(_modules(name, path))
        settings = path / "sentence_bert_config.json"
        stated = read_json(settings) if settings.is_file() else {}
        config = read_json(path / "config.json")
        pooling = [
            way for kind, folder in modules if kind == "Pooling" for way in _ways(read_json(folder / "config.json"))
        ]
    except (SourceError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{name!r}: the settings in {path} cannot be read: {error}") from error
    if found := next((each for each in _ARGUMENTS if stated.get(each)), None):
        raise WeightsError(f"{name!r}: `{found}` in sentence_bert_config.json is not supported: leave it out")
    if "/" in str(config.get("_attn_implementation", "")):
        raise WeightsError(f"{name!r}: config.json asks for attention code from a repository, which is never run")
    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["Transformer"] or kinds.count("Pooling") != 1 or not pooling:
        raise WeightsError(f"{name!r}: modules.json must name a Transformer, then one Pooling; it names {kinds}")
    return Modules(tuple(pooling), "Dense" in kinds, "Normalize" in kinds)


def _modules(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Kind and folder of each module."""
    if (size := check_regular(path / "modules.json")) > _MOST_BYTES:
        raise SourceError(f"modules.json has {size:,} bytes; the most is {_MOST_BYTES:,}")
    for each in loads((path / "modules.json").read_text(encoding="utf-8")):
        package, _, kind = str(each["type"]).rpartition(".")
        folder = str(each["path"])
        if not package.startswith("sentence_transformers.") or kind not in _KINDS:
            raise WeightsError(
                f"{name!r}: modules.json names {each['type']!r}; supported are {', '.join(sorted(_KINDS))}"
            )
        if folder.startswith("/") or ".." in Path(folder).parts:
            raise WeightsError(f"{name!r}: modules.json names the folder {folder!r}, which is not inside {path}")
        if kind == "Dense" and not (path / folder / "model.safetensors").is_file():
            raise WeightsError(f"{name!r}: {path / folder} has no model.safetensors: weights are loaded from that only")
        yield kind, path / folder


def _ways(config: dict[str, Any]) -> list[str]:
    """The ways of pooling that the configuration of a Pooling module states, in either of its forms."""
    stated = config.get("pooling_mode")
    if stated is not None:
        short = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
        return [short.get(str(each), str(each)) for each in (stated if isinstance(stated, list) else [stated])]
    return [name.removeprefix(_MODE) for name, value in config.items() if name.startswith(_MODE) and value is True]
