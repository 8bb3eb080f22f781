"""A LoRA adapter of the primary that is trained with the composition, and takes the place of the primary's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import Parameter

from coe.engines.base import Adapter
from coe.engines.hf.lora.adapter_files import AdapterFiles, read_adapter
from coe.engines.hf.lora.base_parameters import BaseParameters
from coe.errors import ConfigError, Unsupported, WeightsError
from coe.experts import locate
from coe.latent.config import LoraConfig
from coe.latent.training.checks import base_folder
from registry.errors import SourceError
from registry.headers import ADAPTER_FILE
from registry.inspection import inspect
from registry.lora.check import plan_of
from registry.lora.config import ADAPTER_CONFIG
from registry.lora.plan import LoraPlan, is_fused
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

_OWN: Final = "own"
_TRAINED: Final = "trained"
_RANK: Final = 8
_TARGETS: Final = ("q_proj", "v_proj")
_ADVICE: Final = "name another first member or, with the preset `notes`, leave settings.lora out"
_STYLE: Final = ("chat_template.jinja", "tokenizer_config.json")
"""Files of an adapter that determine its prompts."""


class TrainedLora:
    """The adapter that is trained, on a loaded base; the primary's own adapter stays beside it.

    Args:
        model: the base.
        base: its name.
        own: the primary's own adapter, if it is one; it is the start.
        config: rank, alpha and targets.
        seed: of the first matrices.

    Raises:
        ConfigError: the config contradicts the primary's own adapter, or names layers that the base does not have.
        Unsupported: the own adapter is no plain LoRA.
        WeightsError: it cannot be read.
    """

    def __init__(self, model: Any, base: str, own: Adapter | None, config: LoraConfig, *, seed: int) -> None:
        files = None if own is None else read_adapter(own, base, BaseParameters(model))
        self._own = own
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft: Any = self._fresh(model, config) if files is None else self._continued(model, files, config)
        self._peft.set_adapter(_TRAINED)
        self._peft.eval()

    def parameters(self) -> dict[str, Parameter]:
        """The trained matrices by name, in float32."""
        named = self._peft.named_parameters()
        return {f"lora.{name}": parameter for name, parameter in named if f".{_TRAINED}." in name}

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within the block the model is the untouched primary."""
        if self._own is None:
            with self._peft.disable_adapter():
                yield
            return
        self._peft.set_adapter(_OWN, inference_mode=True)
        try:
            yield
        finally:
            self._peft.set_adapter(_TRAINED)

    def write(self, folder: Path) -> None:
        """Write the adapter as peft does, with the prompt settings of the primary's own one."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        weights = get_peft_model_state_dict(self._peft, adapter_name=_TRAINED)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / ADAPTER_FILE)
        config = self._peft.peft_config[_TRAINED].to_dict()
        config |= {"base_model_name_or_path": None, "inference_mode": True}
        config["target_modules"] = sorted(config["target_modules"])
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        for name in _STYLE if self._own is not None else ():
            assert self._own is not None
            if (file := self._own.path / name).is_file():
                shutil.copyfile(file, folder / name)

    def _fresh(self, model: Any, config: LoraConfig) -> Any:
        from peft import LoraConfig as Peft
        from peft import get_peft_model

        rank = config.rank or _RANK
        targets = list(config.targets or _TARGETS)
        settings = Peft(
            r=rank, lora_alpha=config.alpha or 2 * rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        try:
            return get_peft_model(model, settings, adapter_name=_TRAINED)
        except ValueError as error:
            raise ConfigError(f"settings.lora.targets {', '.join(targets)}: {error}") from error

    def _continued(self, model: Any, files: AdapterFiles, config: LoraConfig) -> Any:
        from peft import PeftModelForCausalLM, set_peft_model_state_dict

        assert self._own is not None
        _check_start(self._own.spec.name, files.plan, config)
        settings, weights = files.peft_config(), files.low_rank()
        peft: Any = PeftModelForCausalLM(model, settings, _OWN, autocast_adapter_dtype=False)
        where = {"dtype": model.dtype, "device": model.device}
        set_peft_model_state_dict(peft, {name: each.to(**where) for name, each in weights.items()}, adapter_name=_OWN)
        peft.add_adapter(_TRAINED, files.peft_config())
        set_peft_model_state_dict(peft, {name: each.float() for name, each in weights.items()}, adapter_name=_TRAINED)
        return peft


def check_lora(spec: ExpertSpec, config: LoraConfig | None, snapshot: Snapshot) -> None:
    """Refuse a first member on which no adapter can be trained, from its files, before anything is loaded.

    Raises:
        Unsupported: its adapter is no plain LoRA. ConfigError: the config contradicts it. WeightsError: it is damaged.
    """
    if config is None or spec.kind is not Kind.ADAPTER:
        return
    try:
        plan = plan_of(locate(spec), inspect(base_folder(spec, snapshot)))
    except SourceError as error:
        raise WeightsError(f"{spec.name!r} cannot be trained on: {error}") from error
    _check_start(spec.name, plan, config)


def _check_start(name: str, plan: LoraPlan, config: LoraConfig) -> None:
    """Refuse an adapter that cannot be trained on, and settings that contradict it."""
    if plan.replaced or plan.rows or plan.config.use_dora or plan.config.alora_invocation_tokens:
        raise Unsupported(f"{name!r} is no plain LoRA adapter, and cannot be trained on: {_ADVICE}")
    if any(map(is_fused, plan.ranks)):
        raise Unsupported(f"{name!r} adapts fused experts, and cannot be trained on: {_ADVICE}")
    ranks, alphas = set(plan.ranks.values()), set(plan.alphas.values())
    targets = {module.rpartition(".")[2] for module in plan.ranks}
    checks: list[tuple[str, object, Callable[[], bool]]] = [
        ("rank", config.rank, lambda: ranks == {config.rank}),
        ("alpha", config.alpha, lambda: alphas == {config.alpha}),
        ("targets", config.targets, lambda: targets == set(config.targets or ())),
    ]
    for field, stated, agrees in checks:
        if stated is not None and not agrees():
            raise ConfigError(
                f"settings.lora.{field}: the training goes on with the adapter {name!r}, which has rank "
                f"{_shown(ranks)}, alpha {_shown(alphas)} and targets {_shown(targets)}: leave {field} out"
            )


def _shown(values: set[Any]) -> str:
    return ", ".join(map(str, sorted(values)))
