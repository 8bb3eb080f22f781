"""What frozen members leave of the rows, measured once: states on disk, losses of the bare members, mu and sigma.

A file for each member and text, named by the member's identity and what it reads, so that a resumed run, another seed
and another composition with the same layers compute nothing again:

    states (J, n, d)   float16; float32 if a value exceeds the range of float16
    loss, right ()     of the bare member: nats of the answer, and 1 if each of its tokens is the most likely one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coe.engines.hf.load import translate
from coe.errors import EngineError
from coe.latent.by_length import batches
from coe.latent.training.members import Member, Reading
from coe.latent.training.mot.losses import row_losses
from registry.storage import atomic_path, require_free

_FORMAT: Final = 1
_ROWS_AT_ONCE: Final = 32
_FLOAT16_MOST: Final = 65504.0


@dataclass(frozen=True, eq=False, slots=True)
class Measured:
    """What a bare member leaves of N rows. losses: (N,) nats of each answer. right: (N,) whether it is predicted."""

    losses: Tensor
    right: Tensor


class StateStore:
    """The states of one member at some layers.

    Args:
        folder: of all members.
        identity: of the member's content (`registry.digest.identity`).
        layers: J layers, counted from 1.
    """

    def __init__(self, folder: Path, member: Member, identity: str, layers: Sequence[int]) -> None:
        key = json.dumps([_FORMAT, identity, list(layers), str(member.dtype)])
        self._folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._member, self.layers = member, tuple(layers)

    def states(self, reading: Reading) -> Tensor:
        """(J, n, d) states of a reading that was measured."""
        return self._read(reading)["states"]

    def measure(self, readings: Sequence[Reading], on_progress: Callable[[int, int], None]) -> Measured:
        """Read all rows whose states are not stored yet, and return what the bare member makes of all of them.

        Raises:
            DiskFull: the states do not fit. EngineError, OutOfMemory: the member failed.
        """
        absent = [each for each in readings if not self._path(each).is_file()]
        n_tokens = sum(len(each.ids) for each in absent)
        self._folder.mkdir(parents=True, exist_ok=True)
        require_free(self._folder, n_tokens * len(self.layers) * self._member.decoder.width * 2)
        done = len(readings) - len(absent)
        for rows in batches([len(each.ids) for each in absent], _ROWS_AT_ONCE):
            self._store([absent[row] for row in rows])
            done += len(rows)
            on_progress(done, len(readings))
        found = [self._read(each) for each in readings]
        return Measured(
            torch.stack([each["loss"] for each in found]), torch.stack([each["right"] for each in found]) > 0
        )

    def moments(self, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (J, d) of the states of all tokens."""
        n, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for each in readings:
            states = self.states(each).double()
            n += states.shape[1]
            total, squares = total + states.sum(1), squares + states.square().sum(1)
        mean = total / n
        return mean.float(), (squares / n - mean.square()).clamp_min(0).sqrt().float()

    def _store(self, readings: Sequence[Reading]) -> None:
        with translate(f"{self._member.name!r} failed while reading the rows", EngineError):
            states, logits = self._member.states(readings, self.layers)
        losses, right = score(logits, readings)
        for i, each in enumerate(readings):
            narrow = torch.float16 if float(states[i].abs().max()) <= _FLOAT16_MOST else torch.float32
            tensors = {"states": states[i].to(narrow), "loss": losses[i].cpu(), "right": right[i].float().cpu()}
            with atomic_path(self._path(each)) as path:
                save_file(tensors, path)

    def _read(self, reading: Reading) -> dict[str, Tensor]:
        path = self._path(reading)
        try:
            found: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path} is damaged ({error}): remove it, and start again") from error
        return found

    def _path(self, reading: Reading) -> Path:
        text = json.dumps([reading.ids, reading.end, reading.n_prompt])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"


def score(logits: Tensor, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
    """Nats of each answer, and whether each of its tokens is the most likely one; (n_rows,) twice.

    Args:
        logits: (N, V) of `Member.logits`.
    """
    targets, rows = answer_tokens(readings, logits.device)
    wrong = (logits.argmax(-1) != targets).long()
    n_wrong = torch.zeros(len(readings), dtype=torch.long, device=logits.device).index_add(0, rows, wrong)
    return row_losses(logits, targets, rows, len(readings)), n_wrong == 0


def answer_tokens(readings: Sequence[Reading], device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets (N,) and the row of each (N,)."""
    targets = [each.targets for each in readings]
    rows = [row for row, tokens in enumerate(targets) for _ in tokens]
    flat = [token for tokens in targets for token in tokens]
    return torch.tensor(flat, device=device), torch.tensor(rows, device=device)
