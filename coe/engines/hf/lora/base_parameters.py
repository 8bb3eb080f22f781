"""The parameters of a resident base: compared with those of adapters, and replaced while an adapter runs.

An adapter may bring whole parameters (`modules_to_save`, `bias`) or rows of an embedding (`trainable_token_indices`).
The base's own tensors are never written: a module refers to the adapter's parameter during the adapter's batch, and to
the base's before and after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from registry.lora.plan import LoraPlan


@dataclass(frozen=True, slots=True)
class Replacements:
    """What stands in for parameters of the base, by their names.

    Attributes:
        whole: parameters.
        rows: (n,) row numbers and (n, width) values of an embedding.
    """

    whole: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.rows)


class BaseParameters:
    """The parameters of a model by name, as they are before any adapter wraps its layers.

    A tied weight is listed once for each module that has it.
    """

    def __init__(self, model: Any) -> None:
        self._owners = {
            f"{prefix}.{attribute}" if prefix else attribute: (module, attribute)
            for prefix, module in model.named_modules()
            for attribute, parameter in module.named_parameters(recurse=False)
        }
        self.tensors: dict[str, Tensor] = {name: getattr(*owner) for name, owner in self._owners.items()}

    def equals(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor, in the base's type, has the values of the base's parameter."""
        own = self.tensors[name]
        return own.shape == tensor.shape and bool((own == tensor.to(dtype=own.dtype, device=own.device)).all())

    def replacements(self, plan: LoraPlan, tensors: Mapping[str, Tensor]) -> Replacements:
        """The parameters that an adapter brings, in the base's type and on its device."""
        import torch

        whole = {own: self._like(own, tensors[name]) for name, own in plan.replaced.items()}
        rows = {
            own: (torch.tensor(ids, device=self.tensors[own].device), self._like(own, tensors[name]))
            for name, (own, ids) in plan.rows.items()
        }
        return Replacements(whole, rows)

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        own = self.tensors[name]
        return tensor.to(dtype=own.dtype, device=own.device)

    @contextmanager
    def replaced(self, by: Replacements) -> Iterator[None]:
        """Have the modules of the base use these parameters in the block."""
        import torch

        tensors = dict(by.whole)
        for name, (ids, values) in by.rows.items():
            merged = self.tensors[name].detach().clone()
            merged[ids] = values
            # A head that is tied to the embedding has the same rows.
            tensors |= dict.fromkeys((other for other in self.tensors if self._is_tied(other, name)), merged)
        try:
            for name, tensor in tensors.items():
                self._set(name, torch.nn.Parameter(tensor, requires_grad=False))
            yield
        finally:
            for name in tensors:
                self._set(name, self.tensors[name])

    def _is_tied(self, name: str, other: str) -> bool:
        return self.tensors[name] is self.tensors[other]

    def _set(self, name: str, parameter: Tensor) -> None:
        module, attribute = self._owners[name]
        setattr(module, attribute, parameter)
