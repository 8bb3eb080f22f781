"""Replacing the weights of a model in memory by those of another checkpoint of its shape.

The model, its key-value layout and its place in memory stay; a switch then costs one read and one copy, where a load
also builds the model. It is done only where a file's tensor and a parameter of the model are the same thing: what
transformers renames, merges, permutes or quantises while it loads is loaded by transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coe.engines.hf.weights.files import FLOATS, Stopped, WeightFiles
from registry.headers import Tensor as Header
from registry.headers import read_json

if TYPE_CHECKING:
    import torch

_NAMES: Final = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Keys of config.json that say nothing about what the model computes: it has a dtype of its own here."""
_SAMPLE: Final = 64


def model_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says about the model, without names. Raises SourceError if it cannot be read."""
    return {key: value for key, value in read_json(folder / "config.json").items() if key not in _NAMES}


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """A model in memory whose weights can be replaced.

    Attributes:
        model: a transformers model, without adapters.
        config: what its config.json says, without names.
        tensors: its parameters and saved buffers by name, as they are before an adapter wraps its layers; a tied
            weight has several names.
    """

    model: Any
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any, files: WeightFiles) -> InPlace | None:
        """A model just loaded from these files; None if it does not hold their tensors unchanged but for the type.

        Compares the ends of each tensor: a weight that was transposed, permuted or scaled differs there.

        Raises:
            SourceError: config.json cannot be read.
            WeightsError: a file has become shorter.
        """
        found = cls(model, model_config(files.folder), dict(model.state_dict(keep_vars=True)))
        return found if found._fits(files.headers) and found._holds(files) else None

    def takes(self, files: WeightFiles) -> bool:
        """Whether the weights can be replaced by those of `files`. Raises SourceError if its config cannot be read."""
        return model_config(files.folder) == self.config and self._fits(files.headers)

    def copy(self, tensors: Iterable[tuple[str, torch.Tensor]], stop: threading.Event | None = None) -> None:
        """Overwrite the weights, tensor by tensor, in the model's type and on its device. Blocks.

        On CUDA the copies run on a stream of their own, so that other models compute meanwhile; they are over on
        return.

        Raises:
            Stopped: `stop` was set; the model then holds weights of both.
        """
        import torch

        cuda: Any = torch.cuda
        stream = cuda.Stream(self.model.device) if self.model.device.type == "cuda" else None
        held = []  # until the copies are over, which read them
        with torch.no_grad(), cuda.stream(stream):
            for name, tensor in tensors:
                if stop is not None and stop.is_set():
                    raise Stopped
                self.tensors[name].copy_(tensor, non_blocking=stream is not None)
                if stream is not None:
                    held.append(tensor)
            if stream is not None:
                stream.synchronize()

    def _fits(self, headers: Mapping[str, Header]) -> bool:
        """Whether every file's tensor is a parameter by name and shape, and every parameter has exactly one tensor."""
        own = self.tensors
        if any(header.dtype not in FLOATS for header in headers.values()):
            return False
        if any(name not in own or tuple(own[name].shape) != header.shape for name, header in headers.items()):
            return False
        if any(not tensor.is_floating_point() or tensor.is_meta for tensor in own.values()):
            return False
        given = [own[name].data_ptr() for name in headers]
        return len(given) == len(set(given)) and {tensor.data_ptr() for tensor in own.values()} == set(given)

    def _holds(self, files: WeightFiles) -> bool:
        import torch

        for name in files.headers:
            values = self.tensors[name].detach().reshape(-1)
            n = min(_SAMPLE, values.numel())
            here = torch.cat([values[:n], values[values.numel() - n :]]).cpu()
            there = files.sample(name, n).to(here.dtype)
            if not bool(((here == there) | (here.isnan() & there.isnan())).all()):
                return False
        return True
