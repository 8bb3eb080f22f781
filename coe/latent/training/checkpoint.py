"""The state of an interrupted training on disk: safetensors and JSON, whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from coe.errors import ConfigError
from coe.latent.training.trainer import Validation
from registry.errors import SourceError
from registry.headers import read_json
from registry.storage import atomic_directory

_STATE, _NOW, _BEST = "state.json", "now.safetensors", "best.safetensors"
_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a tensor that has had a gradient."""
_MOST_BYTES: Final = 2**20


@dataclass(slots=True)
class State:
    """Where a training is.

    Attributes:
        before, best, last: validations: of the start, the best and the last one.
        step: steps done. best_step: after which `best` was found.
        n_worse: validations since the best one. validated: step of the last one.
        seconds: spent so far.
    """

    before: Validation
    best: Validation
    last: Validation
    step: int = 0
    best_step: int = 0
    n_worse: int = 0
    validated: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that holds one state.

    Attributes:
        folder: may not exist yet.
    """

    folder: Path

    @property
    def step(self) -> int:
        """Steps of the checkpoint; 0 without one. Raises ConfigError if it is damaged."""
        document = self._document()
        return 0 if document is None else _state(document).step

    def save(
        self,
        state: State,
        tensors: Mapping[str, Parameter],
        optimizer: torch.optim.Optimizer,
        best: Mapping[str, Tensor],
    ) -> None:
        """Write the state; the former one is replaced."""
        now = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            moments = optimizer.state.get(tensor, {})
            now |= {f"{name}.{moment}": moments[moment].cpu().clone() for moment in _MOMENTS if moment in moments}
        with atomic_directory(self.folder) as folder:
            save_file(now, folder / _NOW)
            save_file(dict(best), folder / _BEST)
            (folder / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")

    def load(self, tensors: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> State | None:
        """Put tensors and moments in place; None if there is no checkpoint.

        Raises:
            ConfigError: the checkpoint is damaged, or of other tensors.
        """
        if (document := self._document()) is None:
            return None
        try:
            state, saved = _state(document), load_file(self.folder / _NOW)
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])
                    if f"{name}.step" in saved:
                        moments = {moment: saved[f"{name}.{moment}"] for moment in _MOMENTS}
                        optimizer.state[tensor] = {
                            moment: value if moment == "step" else value.to(tensor.device)
                            for moment, value in moments.items()
                        }
        except (SafetensorError, KeyError, RuntimeError, OSError) as error:
            raise self._damaged(error) from error
        return state

    def best(self) -> dict[str, Tensor]:
        """The best tensors so far. Call it after `load`."""
        try:
            return dict(load_file(self.folder / _BEST))
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def remove(self) -> None:
        """Remove the folder, once the training is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _document(self) -> dict[str, Any] | None:
        if not (self.folder / _STATE).is_file():
            return None
        try:
            document = read_json(self.folder / _STATE, most_bytes=_MOST_BYTES)
            _state(document)
        except (SourceError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        return document

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.folder} is damaged ({error}): remove it to start again")


def _state(document: Mapping[str, Any]) -> State:
    validations = {name: Validation(**document[name]) for name in ("before", "best", "last")}
    return State(**{**document, **validations})
