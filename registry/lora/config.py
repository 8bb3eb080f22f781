"""adapter_config.json of a LoRA adapter: what is supported, what is refused and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from registry.errors import SourceError
from registry.headers import read_json
from registry.lora.patterns import PatternMatcher, ends_with

ADAPTER_CONFIG: Final = "adapter_config.json"
ALL_LINEAR: Final = "all-linear"
MOST_BYTES: Final = 4 * 2**20  # of adapter_config.json
MOST_PATTERNS: Final = 4_096  # keys of rank_pattern or alpha_pattern, entries of layers_pattern
MOST_RANK: Final = 2**16
_MOST_SHOWN: Final = 80  # characters of a stated value in an error

REFUSED: Final[Mapping[str, str]] = {
    "arrow_config": "it routes between other adapters",
    "kasa_config": "it changes the weights of the base",
    "layer_replication": "it changes the layers of the base",
    "megatron_config": "it needs Megatron layers",
    "monteclora_config": "it samples its weights",
    "target_parameters": "it adapts parameters, not modules",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "it needs the quantised base that it was trained on",
    "velora_config": "its layers are not supported",
}
"""Settings that the engine cannot serve, with the reason."""
IGNORED: Final = frozenset((
    "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
))  # fmt: skip
"""Settings without an effect on a trained adapter: they concern its training."""
_TASK: Final = "CAUSAL_LM"
"""The one task type of experts: they continue text. Without a stated one, the adapter counts as such."""
_OTHER_TASKS: Final[Mapping[str, str]] = {
    "FEATURE_EXTRACTION": "it returns embeddings, not text",
    "QUESTION_ANS": "it marks spans of a text, and writes none",
    "SEQ_2_SEQ_LM": "it is of an encoder-decoder model",
    "SEQ_CLS": "it classifies texts, and writes none",
    "TOKEN_CLS": "it labels tokens, and writes no text",
}
_OTHER_CLASSES: Final = re.compile(
    r"For(?:Sequence|Token|Image|Audio|Video)\w*Classification|ForQuestionAnswering|ForMaskedLM|ForMultipleChoice"
    r"|ForNextSentencePrediction|ForPreTraining|ForTextEncoding|RewardModel"
)
"""Model classes in `auto_mapping` that do not write text; peft states them where it states no task type."""
_UNUSED: Final[tuple[Any, ...]] = (None, False, "none", [], {})
_HARMLESS_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged; with others the adapter needs a modified base."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of an adapter that affect its answers, checked; peft's names and meanings.

    Attributes:
        tokens: `trainable_token_indices`, by module; the key "" is the input embedding.
    """

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | frozenset[str] | None = None
    exclude_modules: str | frozenset[str] | None = None
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: frozenset[str] = frozenset()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    alora_invocation_tokens: tuple[int, ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False

    def targets(self, module: str, matcher: PatternMatcher) -> bool:
        """Whether peft adapts a module of that name; always, if the config does not state `target_modules`."""
        target, excluded = self.target_modules, self.exclude_modules
        if excluded and (matcher.whole(excluded, module) if isinstance(excluded, str) else ends_with(module, excluded)):
            return False
        if isinstance(target, str):
            return target.lower() == ALL_LINEAR or matcher.whole(target, module)
        if target is not None and not ends_with(module, target):
            return False
        if self.layers_to_transform is None or (target is not None and module in target):
            return True
        return self._layer(module, matcher) in self.layers_to_transform

    def _layer(self, module: str, matcher: PatternMatcher) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            if (layer := matcher.layer(pattern, module)) is not None:
                return layer
        return None

    def rank(self, module: str, matcher: PatternMatcher) -> int:
        """The stated rank of a module."""
        return next((rank for key, rank in self.rank_pattern.items() if matcher.end(key, module)), self.r)

    def alpha(self, module: str, matcher: PatternMatcher) -> float:
        """The numerator of a module's scaling."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if matcher.end(key, module)), self.lora_alpha)


def read_lora_config(folder: Path) -> LoraConfig:
    """The config of an adapter's folder.

    Raises:
        SourceError: it is missing, not of LoRA, invalid, or sets what no engine here supports.
    """
    path = folder / ADAPTER_CONFIG
    stated = read_json(path, most_bytes=MOST_BYTES)
    if (peft_type := stated.get("peft_type")) != "LORA":
        raise SourceError(f"{path} has peft_type {peft_type!r}; only LORA is supported")
    _refuse_unsupported(stated, path)
    try:
        return _parse(stated)
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{path} is invalid: {error}") from error


def _refuse_unsupported(stated: Mapping[str, Any], path: Path) -> None:
    for name, reason in REFUSED.items():
        if stated.get(name) not in _UNUSED:
            raise SourceError(f"{path} sets {name}, which is not supported: {reason}")
    _refuse_other_tasks(stated, path)
    start = stated.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise SourceError(
            f"{path}: it was trained with init_lora_weights={start!r}, which modifies the base: convert it to a plain "
            "LoRA adapter (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _refuse_other_tasks(stated: Mapping[str, Any], path: Path) -> None:
    """Raise SourceError unless the adapter is of a model that writes text."""
    task, mapping = stated.get("task_type"), stated.get("auto_mapping")
    if task is not None and (not isinstance(task, str) or task.upper() != _TASK):
        shown = repr(task)[:_MOST_SHOWN]
        reason = _OTHER_TASKS.get(task.upper(), "it is unknown") if isinstance(task, str) else "it is not a name"
        raise SourceError(f"{path} has task_type {shown}; only {_TASK} can be served: {reason}")
    of = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if task is None and isinstance(of, str) and _OTHER_CLASSES.search(of[:_MOST_SHOWN]):
        raise SourceError(
            f"{path} has no task_type, and its auto_mapping states a {of[:_MOST_SHOWN]}: only adapters of models that "
            f"write text ({_TASK}) can be served"
        )


def _parse(stated: Mapping[str, Any]) -> LoraConfig:
    def get(name: str, default: Any) -> Any:
        value = stated.get(name)
        return default if value is None else value

    layers = stated.get("layers_to_transform")
    target = _modules(stated, "target_modules")
    if isinstance(target, str) and layers not in (None, []):
        raise ValueError("layers_to_transform cannot be used with target_modules as a pattern")
    patterns = get("layers_pattern", ())
    return LoraConfig(
        r=_rank(get("r", 8)),
        lora_alpha=_number(get("lora_alpha", 8), "lora_alpha"),
        rank_pattern={key: _rank(value) for key, value in _mapping(get("rank_pattern", {}), "rank_pattern").items()},
        alpha_pattern={
            key: _number(value, "alpha_pattern")
            for key, value in _mapping(get("alpha_pattern", {}), "alpha_pattern").items()
        },
        target_modules=target,
        exclude_modules=_modules(stated, "exclude_modules") or None,
        layers_to_transform=None if layers in (None, []) else frozenset(_integers(layers, "layers_to_transform")),
        layers_pattern=_strings([patterns] if isinstance(patterns, str) else patterns, "layers_pattern"),
        modules_to_save=frozenset(_strings(get("modules_to_save", ()), "modules_to_save")),
        tokens=_tokens(get("trainable_token_indices", {})),
        alora_invocation_tokens=_integers(get("alora_invocation_tokens", ()), "alora_invocation_tokens"),
        bias=_choice(get("bias", "none"), "bias", ("none", "all", "lora_only")),
        **{name: _flag(get(name, False), name) for name in _FLAGS},
    )


_FLAGS: Final = ("lora_bias", "use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying")


def _modules(stated: Mapping[str, Any], name: str) -> str | frozenset[str] | None:
    value = stated.get(name)
    return value if value is None or isinstance(value, str) else frozenset(_strings(value, name))


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} is not a list of names")
    if name == "layers_pattern" and len(value) > MOST_PATTERNS:
        raise ValueError(f"{name} has {len(value):,} entries; the most: {MOST_PATTERNS:,}")
    return tuple(value)


def _integers(value: Any, name: str) -> tuple[int, ...]:
    numbers = [value] if type(value) is int else value
    if not isinstance(numbers, list | tuple) or not all(type(each) is int and each >= 0 for each in numbers):
        raise TypeError(f"{name} is not a list of whole numbers")
    return tuple(numbers)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    by_module = {"": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict):
        raise TypeError("trainable_token_indices is neither a list nor a mapping")
    return {name: _integers(ids, "trainable_token_indices") for name, ids in by_module.items() if ids}


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not a mapping")
    if len(value) > MOST_PATTERNS:
        raise ValueError(f"{name} has {len(value):,} keys; the most: {MOST_PATTERNS:,}")
    return value


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MOST_RANK:
        raise ValueError(f"a rank of {value!r}: it must be from 1 to {MOST_RANK:,}")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{name} is {value!r}, not true or false")
    return value


def _choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")
    return str(value)
