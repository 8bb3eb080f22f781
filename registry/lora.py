"""Check that a LoRA adapter (arXiv 2106.09685) fits its base, from the headers of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from registry.errors import SourceError
from registry.headers import Tensor, read_adapter_weights, read_json
from registry.inspection import Facts

_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B)(\.weight)?")
_BLOCK = re.compile(r"\.(layers|h|blocks?)\.\d+\.")

Shape = tuple[int, ...]


def read_lora(folder: Path, base_name: str, base: Facts) -> dict[str, Tensor]:
    """The tensors of an adapter that fits `base`.

    Raises:
        SourceError: it is not LoRA or damaged, or has a module that the base lacks or has in another shape.
    """
    config = read_json(folder / "adapter_config.json")
    if (peft_type := config.get("peft_type")) != "LORA":
        raise SourceError(f"{folder} is an adapter of type {peft_type!r}; only LORA is supported")
    tensors = read_adapter_weights(folder)
    modules = _modules(folder, tensors)
    find = _gguf_finder(base) if base.is_gguf else _finder(base.tensors)
    transposed = bool(config.get("fan_in_fan_out")) and not base.is_gguf  # GGUF stores GPT-2's Conv1D as Linear
    problems = [
        problem
        for module, parts in modules.items()
        if (problem := _misfit(module, parts, find(module), transposed)) is not None
    ]
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise SourceError(f"adapter {folder} does not fit its base {base_name!r}: {problems[0]}{more}")
    return tensors


def _modules(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Shape]]:
    """`{module: {"A": shape, "B": shape}}`, always with both parts."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, tensor in tensors.items():
        if found := _LORA.fullmatch(name):
            modules.setdefault(found["module"], {})[found["part"]] = tensor.shape
    if not modules:
        raise SourceError(f"{folder} has no LoRA weights (names like base_model.model.*.lora_A.weight)")
    for module, parts in modules.items():
        if parts.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise SourceError(f"{folder}: module {module} has only lora_{', lora_'.join(sorted(parts))}")
    return modules


def _misfit(module: str, parts: Mapping[str, Shape], base: Shape | None, transposed: bool) -> str | None:
    if base is None:
        # transformers fuses the weights of MoE experts at load, so their names on disk may differ.
        return None if ".experts" in module else f"module {module} is not in the base"
    is_embedding = "embedding_A" in parts
    first, second = (parts["embedding_A"], parts["embedding_B"]) if is_embedding else (parts["A"], parts["B"])
    if len(first) < 2 or len(second) < 2 or first[0] != second[1]:
        return f"module {module} has lora_A {first} and lora_B {second}, whose ranks differ"
    # Linear (out, in): A (r, in), B (out, r). Embedding (tokens, dim): A (r, tokens), B (dim, r).
    product = (first[1], second[0]) if is_embedding or transposed else (second[0], first[1])
    if product != base[:2]:
        return f"module {module} needs a weight of shape {product}, but the base has {base}"
    return None


def _finder(tensors: Mapping[str, Tensor]) -> Callable[[str], Shape | None]:
    """Finds the shape of a module's weight by its full name or, since wrappers add prefixes, by its unique suffix."""
    by_end: dict[str, list[Shape]] = {}
    for name, tensor in tensors.items():
        by_end.setdefault(_end_of(name.removesuffix(".weight")), []).append(tensor.shape)

    def find(module: str) -> Shape | None:
        exact = tensors.get(f"{module}.weight")
        if exact is not None:
            return exact.shape
        same_end = by_end.get(_end_of(module), [])
        return same_end[0] if len(same_end) == 1 else None

    return find


def _end_of(module: str) -> str:
    """`model.language_model.layers.3.mlp.up_proj` -> `.layers.3.mlp.up_proj`; `model.lm_head` -> `lm_head`."""
    found = _BLOCK.search(f".{module}")
    return f".{module}"[found.start() :] if found else module.rpartition(".")[2]


def _gguf_finder(base: Facts) -> Callable[[str], Shape | None]:
    """Finds the shape of a module's weight in a GGUF file, which names tensors differently."""
    import gguf

    architecture = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture), None)
    blocks = 1 + max((int(name.split(".")[1]) for name in base.tensors if name.startswith("blk.")), default=0)
    names = gguf.get_tensor_name_map(architecture or gguf.MODEL_ARCH.LLAMA, blocks)

    def find(module: str) -> Shape | None:
        tensor = base.tensors.get(names.get_name(f"{module}.weight", try_suffixes=(".weight",)) or "")
        return None if tensor is None else tensor.shape

    return find
