"""Reading a LoRA adapter for a resident base: which tensors are used is decided by `registry.lora.plan` alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from re import escape
from typing import TYPE_CHECKING, Any, Final

from coe.engines.base import Adapter
from coe.errors import WeightsError
from registry.errors import SourceError
from registry.headers import ADAPTER_FILE, check_regular
from registry.lora.base import BaseWeights
from registry.lora.config import ADAPTER_CONFIG, read_lora_config
from registry.lora.plan import LoraPlan, differs, plan_lora

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.base_parameters import BaseParameters

_FLAGS: Final = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The used tensors of an adapter, checked against the base.

    Attributes:
        tensors: by their names in the file: those of `plan.loaded`, `plan.replaced` and `plan.rows`.
    """

    plan: LoraPlan
    tensors: dict[str, Tensor]

    def low_rank(self) -> dict[str, Tensor]:
        """The low-rank matrices by peft's names."""
        return {name: self.tensors[stated] for stated, name in self.plan.loaded.items()}

    def peft_config(self) -> Any:
        """peft's config of exactly the planned modules, without any pattern of the file: peft matches them unbounded.

        Initial weights are skipped, since all weights are set afterwards.
        """
        from peft import LoraConfig

        config, ranks, alphas = self.plan.config, self.plan.ranks, self.plan.alphas
        rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
        return LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            init_lora_weights=False,
            target_modules=list(ranks),
            r=rank,
            lora_alpha=alpha,
            rank_pattern={escape(module): each for module, each in ranks.items() if each != rank},
            alpha_pattern={escape(module): each for module, each in alphas.items() if each != alpha},
            alora_invocation_tokens=list(config.alora_invocation_tokens) or None,
            **{name: getattr(config, name) for name in _FLAGS},
        )


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def read_adapter(adapter: Adapter, base: str, parameters: BaseParameters) -> AdapterFiles:
    """Read an adapter for a base: JSON and safetensors, no pickle, no code. Nothing of the base is changed.

    Raises:
        WeightsError: files are missing or damaged, or the adapter does not fit the base, or would change it.
    """
    name = f"adapter {adapter.spec.name!r}"
    where = f"{name} ({adapter.path})"
    for file in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (adapter.path / file).is_file():
            reason = f"has no {file}: only LoRA adapters in safetensors can be loaded"
            raise WeightsError(f"{where} {reason}", public=f"{name} {reason}")
    try:
        config = read_lora_config(adapter.path)
        tensors = _read_tensors(adapter)
    except (OSError, ValueError, SourceError) as error:
        raise WeightsError(f"{where} cannot be read: {error}", public=f"{name} cannot be read") from error
    try:
        plan = plan_lora(config, _shapes(tensors), BaseWeights(_shapes(parameters.tensors)))
        for name, own in plan.same.items():
            if not parameters.equals(own, tensors[name]):
                raise differs(name, own)
    except SourceError as error:
        reason = f"does not fit its base {base!r}: {error}"
        raise WeightsError(f"{where} {reason}", public=f"{name} {reason}") from error
    used = {name: tensors[name] for name in (*plan.loaded, *plan.replaced, *plan.rows)}
    if (broken := next((name for name, tensor in used.items() if not tensor.isfinite().all()), None)) is not None:
        reason = f"has weights that are not finite numbers, in {broken}"
        raise WeightsError(f"{where} {reason}", public=f"{name} {reason}")
    return AdapterFiles(plan, used)


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors, read into memory: those of a mapped file would change with the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = adapter.path / ADAPTER_FILE
    check_regular(path)
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or truncated: {error}") from error


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
