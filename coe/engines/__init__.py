"""Engines: they load the files of experts and generate. `base` has the protocols, `ENGINES` lists the kinds.

Other packages add engines by entry points in the group `coe.engines`; `module:Class` names any class. An expert
names the engine that serves it by `engine:` in its spec (docs/plugins.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from coe.engines.base import Adapter, Capabilities, Engine, Expert, LoadingEngine, ShapeKey, Slot, SlotEngine
from coe.errors import CoeError, ConfigError
from coe.seam import is_interrupt, text_of
from registry.errors import PluginError
from registry.plugins import Plugins
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind

__all__ = [
    "ENGINES",
    "Adapter",
    "Capabilities",
    "Engine",
    "Expert",
    "LoadingEngine",
    "ShapeKey",
    "Slot",
    "SlotEngine",
    "capabilities",
    "create_engine",
    "engine_kind",
    "holds_weights",
]

ENGINES: Final[dict[str, str]] = {
    "command": "coe.engines.command.engine:CommandEngine",
    "fake": "coe.engines.fake:FakeEngine",
    "hf": "coe.engines.hf.engine:HFEngine",
    "remote": "coe.engines.remote.engine:RemoteEngine",
    "vllm": "coe.engines.vllm.engine:VLLMEngine",
}
"""Kind -> its class, imported on first use. To add an engine: one file, and one line here."""

AUTO: Final = "auto"
"""As the engine of a spec: chosen by `engine_kind`, as if none were stated."""

_VLLM_READS: Final = frozenset({"awq", "gptq", "compressed-tensors"})
"""Quantisations that vLLM computes with on a CPU, too (AWQ and GPTQ on one with AVX-512); transformers needs further
packages for them."""

_COMPOSED_LACK: Final[Mapping[str, frozenset[str]]] = {
    "notes": frozenset({"token_prompts"}),
    "cache": frozenset({"token_prompts"}),
    "mot": frozenset({"token_prompts", "prompt_logprobs"}),
    "logits": frozenset({"prompt_logprobs"}),
}
"""Architecture of composed experts -> what they cannot do although their engine can: token ids are of one tokenizer,
and scores of a prompt of one model."""

_PLUGINS = Plugins(
    "coe.engines",
    "engine",
    ENGINES,
    needs=("capabilities", "footprint", "load", "unload"),
    or_needs=("capabilities", "footprint", "shape", "slots_per_shape", "slot_bytes", "open_slot"),
)


def engine_kind(spec: ExpertSpec, *, on_cpu: str = "hf") -> str:
    """The kind of engine that serves `spec`: the stated one, else `remote`, `command` or `fake` by its source.

    Else, and for the engine `auto`, it is the one of `weights_engine`; on a CPU, weights that transformers cannot read
    without further packages (`_VLLM_READS`) run on vLLM where its build for CPUs is installed.

    Args:
        on_cpu: the engine of weights on a CPU (`engines.auto_on_cpu`).
    """
    if spec.engine not in (None, AUTO):
        return spec.engine
    if spec.kind is Kind.REMOTE:
        return "remote" if spec.server is None else "command"
    if spec.kind is Kind.COMPOSED:
        return COMPOSED_ARCHITECTURES.get(spec.architecture or "", "hf")
    if spec.source.startswith("fake://"):
        return "fake"
    return weights_engine("vllm" if spec.quantization in _VLLM_READS else on_cpu)


@cache
def weights_engine(on_cpu: str = "hf") -> str:
    """The engine of weights on this machine that name none: `vllm` if it can run on a CUDA device here.

    Else it is `on_cpu` where vLLM's build for CPUs is installed, and `hf` elsewhere.
    """
    from coe.engines.vllm import process

    if not process.is_installed():
        return "hf"
    if process.on_cpu():
        return on_cpu
    import torch

    return "vllm" if torch.cuda.is_available() else "hf"


def create_engine(kind: str, **options: Any) -> Engine:
    """An engine of the given kind; `options` are its constructor's arguments.

    Raises:
        ConfigError: there is no such kind, its class cannot be imported or is no engine, it refuses the options, or its
            `capabilities` are not `Capabilities`.
    """
    try:
        engine: Engine = _PLUGINS.load(kind)(**options)
    except PluginError as error:
        raise ConfigError(str(error)) from error
    except BaseException as error:  # third-party code may raise anything
        if is_interrupt(error):
            raise
        raise ConfigError(f"engine {kind!r} cannot be created with {options}: {_told(error)}") from error
    _able(kind, engine.capabilities)
    return engine


def _told(error: BaseException) -> str:
    """The message; with the class, if it is none of those that arguments of a wrong kind or value lead to."""
    text = text_of(error)
    return text if isinstance(error, TypeError | ValueError | CoeError) else f"{type(error).__name__}: {text}"


def holds_weights(kind: str) -> bool:
    """Whether experts on an engine of this kind take memory in this process (its class attribute `weights`).

    Raises:
        ConfigError: there is no such kind, or its class cannot be imported or is no engine.
    """
    try:
        return bool(getattr(_PLUGINS.load(kind), "weights", True))
    except PluginError as error:
        raise ConfigError(str(error)) from error


def capabilities(experts: Mapping[str, ExpertSpec]) -> dict[str, frozenset[str]]:
    """Expert -> names of what the engine that serves it can do (see `Capabilities`), for `routers.constraints`.

    Experts whose engine is not installed in this process are left out: nothing is known about it here.

    Raises:
        ConfigError: the `capabilities` of an engine are not `Capabilities`.
    """
    known = {name: _names(engine_kind(experts[spec.base] if spec.base else spec)) for name, spec in experts.items()}
    return {name: names - _lacks(experts[name]) for name, names in known.items() if names is not None}


def _lacks(spec: ExpertSpec) -> frozenset[str]:
    """What a composed expert cannot do, although its engine can."""
    return _COMPOSED_LACK.get(spec.architecture or "", frozenset()) if spec.kind is Kind.COMPOSED else frozenset()


@cache
def _names(kind: str) -> frozenset[str] | None:
    try:
        able = _PLUGINS.load(kind).capabilities
    except PluginError:
        return None
    return _able(kind, able).names


def _able(kind: str, able: object) -> Capabilities:
    if not isinstance(able, Capabilities):
        raise ConfigError(
            f"engine {kind!r}: `capabilities` must be a class attribute of type coe.engines.Capabilities, not "
            f"{type(able).__name__} (docs/plugins.md)"
        )
    return able
