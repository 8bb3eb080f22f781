"""What a LoRA adapter (arXiv 2106.09685) changes on its base, decided from its config and the names of its tensors.

    plan = plan_lora(read_lora_config(folder), shapes, base)

The registry plans with the headers of both files, the engine again with the modules in memory: the same function, the
same reasons. A tensor is read only if the plan names it. An adapter may hold low-rank matrices (`lora_*`), and what its
config declares: whole modules (`modules_to_save`), biases (`bias`), rows of an embedding (`trainable_token_indices`).
Copies of base weights, which peft saves beside them on request, are allowed if they equal the base's, and are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from registry.errors import SourceError
from registry.lora.base import BaseWeights, Shape, is_tied_end
from registry.lora.config import ADAPTER_CONFIG, LoraConfig
from registry.lora.patterns import PatternMatcher, ends_with

PEFT_PREFIX: Final = "base_model.model."
_WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
"""Components of names that torch.compile, FSDP and DDP insert."""
_LORA: Final = re.compile(
    r"(?P<module>.+)\.lora_"
    r"(?:(?P<part>embedding_A|embedding_B|A\.weight|B\.weight|B\.bias)|(?P<dora>magnitude_vector)(?:\.weight)?)"
)
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"
_NOT_FUSED: Final = ("use_dora", "lora_bias", "alora_invocation_tokens", "rank_pattern", "alpha_pattern")
_ADVICE: Final = (
    "an adapter cannot replace weights of its base. Save it without them "
    "(peft: save_pretrained(save_embedding_layers=False)), or register the merged model (peft: merge_and_unload)"
)
_LAYER: Final = re.compile(r"(?P<stack>.*?\.(?:layers|h|blocks?))\.\d+\.")


@dataclass(slots=True)
class LoraPlan:
    """What an engine does with the tensors of an adapter, by their names in its file.

    Attributes:
        loaded: low-rank matrices: peft's name of each, with the module as the base names it.
        ranks, alphas: rank and numerator of the scaling of each adapted module of the base.
        replaced: tensors that stand in for a parameter of the base while the adapter runs: its name.
        rows: rows of an embedding: the name of its weight, and the row numbers.
        same: copies of base weights, which must equal those of that name, and are not loaded.
    """

    config: LoraConfig
    loaded: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def plan_lora(config: LoraConfig, tensors: Mapping[str, Shape], base: BaseWeights) -> LoraPlan:
    """Decide what each tensor of an adapter is.

    Args:
        tensors: names and shapes of all tensors of the adapter's file.
        base: names and shapes of the base.

    Raises:
        SourceError: the adapter does not fit the base, contradicts its config, lacks weights, or has other tensors.
    """
    plan, parts = LoraPlan(config), _Parts()
    others: dict[str, str] = {}
    for name in sorted(tensors):
        path = _path(name)
        if found := _LORA.fullmatch(path):
            parts.add(name, found["module"], found["part"] or found["dora"])
        else:
            others[name] = path
    if not parts.by_module:
        raise SourceError(f"the file has no LoRA weights (names like {PEFT_PREFIX}*.lora_A.weight)")
    matcher = PatternMatcher(ADAPTER_CONFIG)
    _plan_modules(plan, parts, tensors, base, matcher)
    for name, path in others.items():
        _plan_other(plan, name, path, tensors[name], base)
    _check_complete(plan, base, matcher)
    _check_ties(plan)
    return plan


def _path(name: str) -> str:
    """A tensor's name without the prefixes of peft and of wrappers."""
    path = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while path.startswith(PEFT_PREFIX):
        path = path.removeprefix(PEFT_PREFIX)
    return path


@dataclass(slots=True)
class _Parts:
    """The tensors of each adapted module, by the module's name in the adapter and the part."""

    by_module: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, name: str, module: str, part: str) -> None:
        parts = self.by_module.setdefault(module, {})
        if part in parts:
            raise SourceError(f"{parts[part]} and {name} are both the lora_{part} of {module}")
        parts[part] = name


def _plan_modules(
    plan: LoraPlan, parts: _Parts, tensors: Mapping[str, Shape], base: BaseWeights, matcher: PatternMatcher
) -> None:
    problems, found_in = [], dict[str, str]()
    for stated, names in parts.by_module.items():
        _check_parts(plan.config, stated, names)
        shapes = {part: tensors[name] for part, name in names.items()}
        module = base.module(stated)
        if (problem := _misfit(plan.config, stated, shapes, base, module)) is not None:
            problems.append(problem)
            continue
        module = module or stated  # fused experts, which the engine splits
        if module in found_in:
            raise SourceError(f"{found_in[module]} and {stated} are both for {module} of the base")
        found_in[module] = stated
        _check_config(plan.config, stated, module, shapes, matcher)
        plan.ranks[module] = _rank(shapes)
        plan.alphas[module] = plan.config.alpha(stated, matcher)
        plan.loaded |= {name: f"{PEFT_PREFIX}{module}.lora_{part}" for part, name in names.items()}
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise SourceError(f"{problems[0]}{more}")


def _check_parts(config: LoraConfig, module: str, names: Mapping[str, str]) -> None:
    pair = {"embedding_A", "embedding_B"} if "embedding_A" in names else {"A.weight", "B.weight"}
    if missing := sorted(pair - names.keys()):
        has = ", ".join(f"lora_{part.removesuffix('.weight')}" for part in sorted(names))
        raise SourceError(f"module {module} has only {has}: lora_{missing[0]} is missing")
    wanted = pair | ({"magnitude_vector"} if config.use_dora else set())
    wanted |= {"B.bias"} if config.lora_bias and "embedding_A" not in names else set()
    for part in sorted(names.keys() ^ wanted):
        setting = {"magnitude_vector": "use_dora", "B.bias": "lora_bias"}.get(part, "target_modules")
        state = "is missing, though the config sets" if part in wanted else "is present, but the config does not set"
        raise SourceError(f"module {module}: lora_{part} {state} {setting}")


def _misfit(
    config: LoraConfig, stated: str, shapes: Mapping[str, Shape], base: BaseWeights, module: str | None
) -> str | None:
    if module is None:
        # Their names on disk may differ from those in memory.
        return None if is_fused(stated) else f"module {stated} is not in the base"
    is_embedding = "embedding_A" in shapes
    first, second = (shapes[part] for part in sorted(shapes) if part[-1] in "AB" or part.endswith(".weight"))
    if len(first) < 2 or len(second) < 2 or first[0] != second[1]:
        return f"module {stated} has lora_A {first} and lora_B {second}, whose ranks differ"
    # Linear (out, in): A (r, in), B (out, r). Embedding (tokens, dim): A (r, tokens), B (dim, r).
    transposed = config.fan_in_fan_out and not base.is_gguf  # GGUF stores GPT-2's Conv1D as Linear
    product = (first[1], second[0]) if is_embedding or transposed else (second[0], first[1])
    if product != (shape := base.shape(f"{module}.weight"))[:2]:
        return f"module {stated} needs a weight of shape {product}, but the base has {shape}"
    out = second[0]
    for part in ("magnitude_vector", "B.bias"):
        if part in shapes and max(shapes[part], default=0) != out:
            return f"module {stated} has lora_{part} {shapes[part]}, but {out} outputs"
    return None


def _check_config(
    config: LoraConfig, stated: str, module: str, shapes: Mapping[str, Shape], matcher: PatternMatcher
) -> None:
    unfit = [name for name in _NOT_FUSED if getattr(config, name)] if is_fused(module) else []
    if unfit:
        raise SourceError(f"module {stated} is an expert of a fused layer, which cannot be adapted with {unfit[0]}")
    if _is_saved(config, module):
        raise SourceError(f"module {stated} has LoRA weights, and the config has it in modules_to_save")
    if not config.targets(stated, matcher) and not config.targets(module, matcher):
        raise SourceError(f"module {stated} has weights, but the config does not target it ({_targets(config)})")
    if (rank := config.rank(stated, matcher)) != _rank(shapes):
        raise SourceError(f"module {stated} has rank {_rank(shapes)}, but the config states {rank}")


def is_fused(module: str) -> bool:
    """Whether a module is an expert of a mixture of experts: transformers fuses their weights when it loads them."""
    return ".experts" in module


def _rank(shapes: Mapping[str, Shape]) -> int:
    return (shapes.get("A.weight") or shapes["embedding_A"])[0]


def _targets(config: LoraConfig) -> str:
    target = config.target_modules
    text = target if isinstance(target, str) else ", ".join(sorted(target or ()))
    return f"target_modules: {text[:80]}" + ("..." if len(text) > 80 else "")


def _plan_other(plan: LoraPlan, name: str, path: str, shape: Shape, base: BaseWeights) -> None:
    """A tensor that is no low-rank matrix: declared by the config, or a copy of a weight of the base."""
    config = plan.config
    if path.endswith(_TOKENS):
        plan.rows[name] = _token_rows(config, name, path.removesuffix(_TOKENS), shape, base)
        return
    own = base.parameter(path.replace(".base_layer.", ".").replace(".original_module.", "."))
    if own is None:
        raise SourceError(f"{name} is neither a LoRA weight nor in the base: {_ADVICE}")
    if not _is_declared(config, own, plan.ranks):
        plan.same[name] = own
        return
    if shape != base.shape(own):
        raise SourceError(f"{name} has shape {shape}, but {own} of the base has {base.shape(own)}: {_ADVICE}")
    if own in plan.replaced.values():
        raise SourceError(f"{name} and another tensor are both for {own} of the base")
    plan.replaced[name] = own


def _is_declared(config: LoraConfig, parameter: str, adapted: Iterable[str]) -> bool:
    """Whether the config declares that the adapter has its own values of this parameter of the base."""
    module, _, kind = parameter.rpartition(".")
    if _is_saved(config, module):
        return True
    return kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in adapted))


def _is_saved(config: LoraConfig, module: str) -> bool:
    """Whether a module is in `modules_to_save`, or part of one that is."""
    return bool(config.modules_to_save) and _is_part(module, config.modules_to_save)


def _is_part(name: str, modules: frozenset[str]) -> bool:
    """Like peft, which compares the ends of names as text: `norm` is also `input_layernorm`."""
    parts = name.split(".")
    return any(".".join(parts[:n]).endswith(tuple(modules)) for n in range(1, len(parts) + 1))


def _token_rows(
    config: LoraConfig, name: str, module: str, shape: Shape, base: BaseWeights
) -> tuple[str, tuple[int, ...]]:
    own = base.module(module)
    by_module = [ids for key, ids in config.tokens.items() if not key or ends_with(module, {key})]
    if own is None or len(by_module) != 1:
        raise SourceError(f"{name}: trainable_token_indices of the config does not declare this module of the base")
    [ids] = by_module
    n_rows, *width = base.shape(f"{own}.weight")
    if shape != (len(ids), *width) or max(ids) >= n_rows or len({*ids}) != len(ids):
        problem = f"{name} has shape {shape} for {len(ids)} tokens up to {max(ids)}"
        raise SourceError(f"{problem}, but the base has {n_rows} rows of {width}")
    return f"{own}.weight", ids


def differs(name: str, own: str, is_gguf: bool = False) -> SourceError:
    """The error of a tensor that has the name of a base weight and other values."""
    how = "cannot be compared with" if is_gguf else "differs from"
    return SourceError(f"{name} {how} {own} of the base: {_ADVICE}")


def _check_complete(plan: LoraPlan, base: BaseWeights, matcher: PatternMatcher) -> None:
    """Everything that the config declares has weights: modules of the layers that the adapter changes, and the rest."""
    config = plan.config
    stacks = {found["stack"] for module in plan.ranks if (found := _LAYER.match(module))}
    kinds = {module.rpartition(".")[2] for module in plan.ranks}
    for module in base.modules if config.target_modules is not None else ():
        found = _LAYER.match(module)
        if module in plan.ranks or not found or found["stack"] not in stacks or is_fused(module):
            continue
        # A pattern may match modules that are no linear layers here, so only the kinds that it does adapt are checked.
        is_kind = isinstance(config.target_modules, frozenset) or module.rpartition(".")[2] in kinds
        if is_kind and not _is_saved(config, module) and config.targets(module, matcher):
            raise SourceError(f"module {module} is targeted by the config and has no LoRA weights")
    saved = {own for own in base.shapes if _is_saved(config, own.rpartition(".")[0])} - {*plan.replaced.values()}
    if config.modules_to_save and saved:
        raise SourceError(f"{sorted(saved)[0]} is in modules_to_save of the config, and has no weights")
    for name in config.modules_to_save:
        if not any(_is_part(own, frozenset({name})) for own in plan.replaced.values()):
            raise SourceError(f"module {name} is in modules_to_save of the config, and has no weights")
    if len(plan.rows) != len(config.tokens):
        raise SourceError("trainable_token_indices of the config names tokens that have no weights")


def _check_ties(plan: LoraPlan) -> None:
    changed = [*plan.ranks, *(own.rpartition(".")[0] for own in plan.replaced.values())]
    if plan.config.ensure_weight_tying and any(map(is_tied_end, changed)):
        raise SourceError(
            "the config sets ensure_weight_tying, with which embedding and head share one adapter; "
            "that is not supported: train with ensure_weight_tying=False"
        )
